"""The LLMs of a saved model: what training read of them, kept beside the weights, and the LLM
itself when asked for.

Shapes: P prefix tokens, T caption tokens, W width of the LLM.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lidit.config import EncoderSettings
from lidit.config.json_object import read_object
from lidit.config.settings import validate
from lidit.errors import InputError, one_line
from lidit.models import TextStates
from lidit.store import SharedStates, TextFamily, digest_of, normalise, spec_differences
from lidit.store.coding.transform import StateCode
from lidit.store.packing import decode, encode
from lidit.text import PromptEncoder, resolve_encoder

log = logging.getLogger(__name__)
ROUNDING = 0.1  # of a channel's deviation
SHARED_TENSORS = ("prefix", "empty", "mean", "deviation")


@dataclass
class ModelEncoder:
    """One LLM a model was trained with.

    `spec` is the text family's identity and `fingerprint` its sha256; `prefix` [P, W] and `empty`
    [T, W] are the states training used, so sampling from stored states needs no LLM. `settings` say
    where to find it when prompts come as text; it is loaded at the first prompt and refused if its
    fingerprint is another, or if it reads other `token_ids`: of the instruction, and of the empty
    caption. Folders of earlier releases do not say these.
    """

    settings: EncoderSettings
    spec: dict[str, Any]
    fingerprint: str
    prefix: torch.Tensor
    empty: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    loaded: PromptEncoder | None = None
    code: StateCode | None = None
    token_ids: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def name(self) -> str:
        return self.settings.name

    @classmethod
    def of_family(cls, settings: EncoderSettings, family: TextFamily) -> ModelEncoder:
        """The encoder behind a corpus's text family; dtype and storage are fixed to what the family
        holds.
        """
        shared: SharedStates = family.shared()
        exact = {name: family.spec.get(name) for name in ("dtype", "storage", "storage_error")}
        fixed = settings.model_copy(update=exact)
        found = (shared.prefix, shared.empty, shared.mean, shared.deviation)
        ids = (shared.prefix_ids, shared.empty_ids)
        return cls(fixed, family.spec, family.fingerprint, *found, code=shared.code, token_ids=ids)

    def save(self, folder: Path) -> None:
        """`<name>.json` with spec, fingerprint and settings; `<name>.safetensors` with the shared
        states.
        """
        folder.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "spec": self.spec,
            "settings": self.settings.model_dump(mode="json"),
        }
        if self.token_ids is not None:
            facts["prefix_ids"], facts["empty_ids"] = map(list, self.token_ids)
        (folder / f"{self.name}.json").write_text(
            json.dumps(facts, indent=2, sort_keys=True) + "\n"
        )
        tensors = {name: getattr(self, name).cpu().contiguous() for name in SHARED_TENSORS}
        if self.code is not None:  # what rounds a prompt's states as the corpus stores captions'
            tensors["basis"] = self.code.basis.cpu().contiguous()
            tensors["step"] = torch.tensor(self.code.step, dtype=torch.float64)
        save_file(tensors, folder / f"{self.name}.safetensors")

    @classmethod
    def load(cls, folder: Path, name: str) -> ModelEncoder:
        """The inverse of `save`. Raises InputError for a missing, damaged or altered file."""
        path, states = folder / f"{name}.json", folder / f"{name}.safetensors"
        missing = [file.name for file in (path, states) if not file.is_file()]
        if missing:
            raise InputError(
                f"{folder}: the model was trained with the encoder {name!r}, but "
                f"{' and '.join(missing)} "
                f"{'are' if len(missing) > 1 else 'is'} missing; copy the whole model folder"
            )
        try:
            facts = read_object(path, "copy the model folder again")
            spec, fingerprint, settings = facts["spec"], facts["fingerprint"], facts["settings"]
            tensors = load_file(states)
            prefix, empty, mean, deviation = (tensors[label] for label in SHARED_TENSORS)
            ids = None
            if "prefix_ids" in facts:
                ids = (tuple(facts["prefix_ids"]), tuple(facts["empty_ids"]))
            code = None
            if spec["storage"] == "coded":
                code = StateCode(tensors["basis"], float(tensors["step"]))
        except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
            raise InputError(
                f"{path}: encoder {name!r} cannot be read ({one_line(error, 200)}); copy the "
                "model folder again"
            ) from None
        if digest_of(spec) != fingerprint:
            raise InputError(
                f"{path}: the fingerprint does not belong to the spec; the file was edited"
            )
        checked = validate(EncoderSettings, settings, str(path))
        return cls(
            checked, spec, fingerprint, prefix, empty, mean, deviation, code=code, token_ids=ids
        )

    def share(self, encoder: PromptEncoder) -> None:
        """Use an LLM that is already loaded. Raises InputError naming the fields in which it
        differs.
        """
        self._check(encoder.spec.to_dict())
        self._check_tokens(encoder)
        self.loaded = encoder

    def encoder(self, device: str | None = None) -> PromptEncoder:
        """The LLM, loaded once. Raises InputError where it cannot be found or is not the one of the
        training.
        """
        if self.loaded is None:
            spec = resolve_encoder(self.settings)
            self._check(spec.to_dict())
            encoder = PromptEncoder.load(spec, device)
            self._check_tokens(encoder)
            self.loaded = encoder
        return self.loaded

    def encode(self, captions: Sequence[str], device: str | None = None) -> list[torch.Tensor]:
        """States [T_i, W] of each caption, read and rounded as the corpus stores it: the same as
        training saw.
        """
        storage = self.spec["storage"]
        captions = [normalise(text.strip()) for text in captions]  # as ingest does
        rows = []
        encoded = self.encoder(device).encode(captions)
        for caption in encoded:
            values, scale = encode(caption.states, storage, self.mean, self.deviation, self.code)
            rows.append(decode(values, storage, scale, self.mean, self.deviation, self.code))
        # never a word of a prompt: logs outlive requests
        if cut := sum(caption.truncated for caption in encoded):
            log.warning(
                "encoder %s: cut to their first %d tokens, more were not used in training either: "
                "%d of %d prompts",
                self.name, self.spec["max_tokens"], cut, len(encoded),
            )  # fmt: skip
        return rows

    def require_instruction(self, prefix: torch.Tensor) -> None:
        """Raises InputError unless a prefix [P, W] is this encoder's but for rounding: guidance
        would mix the two.
        """
        own, given = self.prefix.float(), prefix.float().to(self.prefix.device)
        # Of another instruction of the same length, states are about a deviation apart.
        if (
            given.shape == own.shape
            and (given - own).abs().sum() <= ROUNDING * self.deviation.mean() * own.numel()
        ):
            return
        raise InputError(
            f"encoder {self.name!r}: these states follow another instruction than the model's"
        )

    def collate(self, rows: Sequence[torch.Tensor]) -> TextStates:
        """Captions' states with this encoder's prefix."""
        return TextStates.collate(rows, self.prefix)

    def _check(self, found: dict[str, Any]) -> None:
        differences = spec_differences(self.spec, found)
        if differences:
            listed = "; ".join(differences)
            raise InputError(
                f"encoder {self.name!r}: {self.settings.model} is not what the model was "
                "trained with "
                f"(trained -> found): {listed}"
            )

    def _check_tokens(self, encoder: PromptEncoder) -> None:
        """The spec names the template; what it renders to is the installed transformers' too."""
        found = (encoder.tokenizer.prefix_ids, encoder.tokenizer.empty_ids)
        if self.token_ids is not None and found != self.token_ids:
            raise InputError(
                f"encoder {self.name!r}: the model was trained behind an instruction of other "
                f"tokens ({len(self.token_ids[0])} then, {len(found[0])} now, or as many others): "
                "another transformers renders the chat template otherwise; install the earlier one"
            )
