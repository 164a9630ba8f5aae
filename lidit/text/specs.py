"""What determines an LLM's states: settings plus the digests of the files they name.

`resolve_encoder` turns `EncoderSettings` into an `EncoderSpec`. Its dictionary holds everything
that changes the stored states and nothing else, so its sha256, the fingerprint, is the same
wherever the same model files lie.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lidit.config import PAPER_INSTRUCTION, EncoderSettings
from lidit.errors import InputError, one_line
from lidit.hub import fetch_snapshot, is_hub_id
from lidit.store.schema import canonical_json, digest_of
from lidit.text.packaged import PREFIX, cache_folder, packaged_model_folder
from lidit.text.rules import (
    ONE_BLOCK,
    PLAIN_TEXT,
    Reading,
    TextRules,
    joined_width,
    resolve_reading,
    set_fields,
    text_rules,
)

ENCODER_VERSION = 1  # raise when the same settings and files begin to give other states
STATE_CODE_VERSION = 1  # raise when the same calibration states begin to give another code
STORAGE_ERROR = 0.1  # of storage coded, where the settings name none
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# keys of config.json that say how it was saved, not what is computed
SAVING_KEYS = (
    "transformers_version",
    "_name_or_path",
    "torch_dtype",
    "dtype",
    "architectures",
    "use_cache",
)


@dataclass(frozen=True)
class EncoderSpec:
    """One frozen encoder, resolved. `folder` is where its files are on this machine; it is not part
    of the identity.

    blocks: transformer blocks that run; final: whether the final norm follows (only when all of
    them run).
    """

    name: str
    folder: str
    kind: Literal["causal", "unmasked", "encoder"]
    model_type: str
    width: int
    blocks: int
    total_blocks: int
    system_prompt: str
    instruction: str
    chat_template: bool
    max_tokens: int
    dtype: Literal["float32", "bfloat16"]
    storage: Literal["float32", "bfloat16", "int8", "int4", "coded"]
    config_sha256: str
    weights_sha256: str
    tokenizer_sha256: str
    template_date: str | None = None
    storage_error: float | None = None
    reading: Reading = ONE_BLOCK
    text: TextRules = PLAIN_TEXT

    def to_dict(self) -> dict[str, Any]:
        """The identity, as `family.json` stores it."""
        apart = ("name", "folder", "fingerprint", "reading", "text")
        fields = {key: value for key, value in self.__dict__.items() if key not in apart}
        for optional in ("template_date", "storage_error"):
            if fields[optional] is None:
                del fields[optional]
        if self.storage == "coded":
            fields["state_code"] = STATE_CODE_VERSION
        return {
            **fields,
            **set_fields(self.reading),
            **set_fields(self.text),
            "code": ENCODER_VERSION,
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of `to_dict()`, hexadecimal."""
        return digest_of(self.to_dict())

    @property
    def final(self) -> bool:
        """Whether the last block runs."""
        return self.blocks == self.total_blocks

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks whose outputs are taken, counted from 1; 0 stands for the embeddings."""
        return self.reading.layers or (self.blocks,)

    @property
    def model_width(self) -> int:
        """Width of the model's own states, of which a stored one may join several."""
        return self.width // joined_width(self.reading, 1)


def resolve_encoder(settings: EncoderSettings, device: str | None = None) -> EncoderSpec:
    """Find the model's files, read its shape, take digests. Loads no weights.

    device: "cpu" or "cuda", where the encoder will run; decides what dtype "auto" means. Default:
    this machine's.

    Raises:
        InputError: no such model, no safetensors, a hub id without revision, a layer the model does
            not have.
    """
    folder = model_folder(settings.model, settings.revision)
    config = _read_config(folder)
    if settings.kind != "encoder" and config.is_encoder_decoder:
        raise InputError(
            f"encoder {settings.name}: {settings.model} is an encoder-decoder model: set kind: "
            "encoder for its encoder"
        )
    text = (
        config.get_text_config(decoder=True)
        if settings.kind != "encoder"
        else _encoder_config(config)
    )
    total, model_width = _shape(text, folder)
    blocks, reading = resolve_reading(settings, total)
    if settings.dtype != "auto":
        dtype = settings.dtype
    else:
        dtype = "bfloat16" if (device or default_device()).startswith("cuda") else "float32"
    whole = settings.kind == "encoder" or settings.template is not None
    if settings.kind == "encoder" and (
        settings.system_prompt or settings.chat_template or settings.instruction
    ):
        raise InputError(
            f"encoder {settings.name}: kind 'encoder' reads the bare caption: leave "
            "instruction, system_prompt and "
            "chat_template out"
        )
    if settings.template_date is not None and not settings.chat_template:
        raise InputError(
            f"encoder {settings.name}: template_date is printed by chat templates: set "
            "chat_template: true"
        )
    instruction = settings.instruction
    if instruction is None:
        instruction = "" if whole else PAPER_INSTRUCTION
    digests = _Digests(folder)
    return EncoderSpec(
        name=settings.name,
        folder=str(folder),
        kind=settings.kind,
        model_type=str(text.model_type),
        width=joined_width(reading, model_width),
        blocks=blocks,
        total_blocks=total,
        system_prompt=settings.system_prompt,
        instruction=instruction,
        chat_template=settings.chat_template,
        max_tokens=settings.max_tokens,
        dtype=dtype,
        storage=dtype if settings.storage == "compute" else settings.storage,
        config_sha256=_config_digest(folder),
        weights_sha256=digests.of(weight_files(folder)),
        tokenizer_sha256=digests.of(
            [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        ),
        template_date=settings.template_date,
        storage_error=(settings.storage_error or STORAGE_ERROR)
        if settings.storage == "coded"
        else None,
        reading=reading,
        text=text_rules(settings),
    )


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def model_folder(model: str, revision: str | None = None) -> Path:
    """The local folder of a model named as `EncoderSettings.model` does; downloads a hub id once.

    Raises:
        InputError: nothing is there, or a hub id comes without the 40-digit commit that pins it.
    """
    if model.startswith(PREFIX):
        return packaged_model_folder(model.removeprefix(PREFIX))
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if not is_hub_id(model):
        raise InputError(
            f"{model}: no such model folder; give a folder, package:NAME, or a hub id with "
            "a revision"
        )
    if revision is None:
        raise InputError(
            f"{model}: neither a folder here nor a pinned hub id: set `revision:` to the commit "
            "(40 hexadecimal digits) or `model:` to a folder; for lidit embed "
            "revision=... or model=./folder behind the options"
        )
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    return fetch_snapshot(model, revision, patterns)


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json: not a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = one_line(error, 300)
        raise InputError(
            f"{folder}: the installed transformers cannot read this config.json ({reason}); "
            "code that comes with a "
            "model is never run"
        ) from None


def _encoder_config(config: Any) -> Any:
    half = getattr(config, "encoder", None)  # T5Gemma has a config for each half
    whole = half if hasattr(half, "num_hidden_layers") else config
    return getattr(whole, "text_config", whole)


def _shape(text: Any, folder: Path) -> tuple[int, int]:
    """Blocks and width that a config names."""
    try:
        return int(text.num_hidden_layers), int(text.hidden_size)
    except (AttributeError, TypeError):
        raise InputError(
            f"{folder}: the config of a {text.model_type} model does not say how many blocks a "
            "text model in it has, "
            "and how wide it is; choose a language model or a text encoder"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in name order. InputError where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in named]
    elif folder / "model.safetensors" in files:  # other copies of the weights may lie beside it
        files = [folder / "model.safetensors"]
    elif files:  # transformers would not find them either
        raise InputError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json beside "
            f"{files[0].name}; rename the "
            "weights to model.safetensors, or save the model with save_pretrained"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise InputError(
            f"{folder}: "
            f"{'missing ' + ', '.join(missing) if missing else 'no *.safetensors file'}; "
            "weights in pickle "
            "formats (.bin, .pt) are never read: convert them with safetensors first"
        )
    return files


def _config_digest(folder: Path) -> str:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return digest_of({key: value for key, value in content.items() if key not in SAVING_KEYS})


class _Digests:
    """sha256 of a model's files, remembered by size and modification time: a 16 GB model is hashed
    once.
    """

    def __init__(self, folder: Path) -> None:
        key = hashlib.sha256(str(folder).encode()).hexdigest()[:24]
        self.memory = cache_folder() / "digests" / f"{key}.json"
        try:
            self.known: dict[str, list[Any]] = json.loads(self.memory.read_text())
        except (OSError, ValueError):
            self.known = {}

    def of(self, files: list[Path]) -> str:
        """One digest for several files: of their names and contents."""
        return digest_of({file.name: self._one(file) for file in files})

    def _one(self, file: Path) -> str:
        status = file.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        found = self.known.get(file.name)
        if found and found[:2] == stamp:
            return str(found[2])
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self.known[file.name] = [*stamp, digest]
        self._remember()
        return digest

    def _remember(self) -> None:
        try:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.memory.with_suffix(f".{os.getpid()}")
            temporary.write_text(canonical_json(self.known))
            temporary.replace(self.memory)
        except OSError:  # a read-only cache only costs the time to hash again
            return
