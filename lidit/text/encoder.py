"""Captions to LLM states: the output of one block of a frozen language model (paper sections 3.1
and 5.1).

Legend: T caption tokens, P prefix tokens, C context tokens, B batch, N tokens of many captions, W
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lidit.config import EncoderSettings
from lidit.config.shipped import load_encoder_settings
from lidit.errors import InputError
from lidit.text.batching import Padding, padding_of, plan_batches, plan_packed
from lidit.text.specs import EncoderSpec, default_device, resolve_encoder
from lidit.text.tokenizer import PromptTokenizer
from lidit.text.trunk import Trunk

TOKEN_BUDGET = 8192
Finish = Callable[[list[int], torch.Tensor], tuple[torch.Tensor, ...]]
PADDING_TRIAL = (
    "a cat",
    "two red circles and a blue square on a green field, photographed in the evening light",
)
# what forgets a part of its context is off by half and more
CONTEXT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
PADDING_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # rounding alone stays below a tenth of it


@dataclass(frozen=True)
class CaptionStates:
    """One encoded caption.

    Args:
        token_ids: T ids, without the instruction's.
        states: [T, W] on the CPU, in the dtype they were computed in.
        truncated: Whether the caption was cut to the encoder's `max_tokens`.
        pooled: [X], where the encoder gives a vector of the whole caption.
    """

    token_ids: tuple[int, ...]
    states: torch.Tensor
    truncated: bool
    pooled: torch.Tensor | None = None


class PromptEncoder:
    """One frozen LLM, ready to encode. Made by `load_encoder`.

    A caption's states depend on no other caption, batch or padding, but for rounding.
    `spec` is what determines the states, `spec.fingerprint` their identity.
    """

    def __init__(self, spec: EncoderSpec, tokenizer: PromptTokenizer, trunk: Trunk) -> None:
        self.spec, self.tokenizer, self.trunk = spec, tokenizer, trunk
        self._prefix: torch.Tensor | None = None
        trunk.require_positions(len(tokenizer.context_ids), tokenizer.longest)
        if spec.kind == "causal" and tokenizer.context_ids:
            states = self.trunk.read_context(self._padded([tokenizer.context_ids]))  # [1, C, W]
            # [P, W]; P = 0 with BOS as context
            self._prefix = states[0, : len(tokenizer.prefix_ids)].cpu()
            self._check_context()
            # On a CPU padded batches are as fast, and their states are those of the families stored
            # so far.
            masked = spec.text.padding is not None and spec.text.padding.masked
            packs = trunk.device.type == "cuda" and not masked
            trunk.packs = packs and trunk.packing_agrees(tokenizer.longest)
        elif spec.kind != "causal" and spec.text.padding is None:
            self._check_padding()

    @classmethod
    def load(cls, spec: EncoderSpec, device: str | None = None) -> PromptEncoder:
        """Load the blocks that a spec needs, and run the instruction once.

        Args:
            spec: From `lidit.text.resolve_encoder`.
            device: "cpu", "cuda" or "cuda:N"; None takes a GPU where there is one.

        Returns:
            The encoder.

        Raises:
            InputError: The spec's folder holds no complete model or tokenizer.
        """
        tokenizer = PromptTokenizer(spec)
        return cls(spec, tokenizer, Trunk.load(spec, device or default_device()))

    def to(self, device: str | torch.device) -> None:
        """Move the LLM; the states it gives are on the CPU wherever it runs.

        Args:
            device: Where to.
        """
        self.trunk.to(device)

    def prefix_states(self) -> tuple[tuple[int, ...], torch.Tensor]:
        """The instruction's states, which are the same for every caption.

        Returns:
            Token ids and states [P, W]. P = 0 for the kinds `unmasked`, where the instruction sees
            the caption, and `encoder`, which has no instruction.
        """
        if self._prefix is None:
            return (), torch.zeros(0, self.spec.width, dtype=getattr(torch, self.spec.dtype))
        return self.tokenizer.prefix_ids, self._prefix

    def empty_states(self) -> tuple[tuple[int, ...], torch.Tensor]:
        """The states of the empty caption, for guidance.

        Returns:
            Token ids and states [T, W].
        """
        ids = self.tokenizer.empty_ids
        return ids, self.encode([""])[0].states

    def empty_pooled(self) -> torch.Tensor | None:
        """The vector of the empty caption.

        Returns:
            [X]; None where the encoder gives no vectors of whole captions.
        """
        return self.encode([""])[0].pooled

    def encode(
        self, captions: Sequence[str], token_budget: int = TOKEN_BUDGET
    ) -> list[CaptionStates]:
        """Encode captions.

        Args:
            captions: Any number of texts; text that looks like a special token is read as plain
                text.
            token_budget: Most tokens of one forward pass, padding included.

        Returns:
            The states of each caption, in the captions' order.
        """
        tokens = self.tokenizer.tokenize(captions)
        ids = [row.token_ids for row in tokens]
        states, pooled = self.encode_rows(ids, token_budget)
        vectors: Sequence[torch.Tensor | None] = pooled or [None] * len(tokens)
        found = zip(tokens, states, vectors, strict=True)
        return [
            CaptionStates(row.token_ids, own, row.truncated, vector) for row, own, vector in found
        ]

    def encode_rows(
        self, token_ids: Sequence[Sequence[int]], token_budget: int = TOKEN_BUDGET
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Encode captions that are tokens already, in their order.

        Args:
            token_ids: Ids of each caption; one without any has no states.
            token_budget: Most tokens of one forward pass, padding included.

        Returns:
            States [T, W] of each caption, and the pooled vectors [X], none where the encoder gives
            no such.
        """
        nothing = torch.zeros(0, self.spec.width, dtype=getattr(torch, self.spec.dtype))
        found = [nothing] * len(token_ids)
        vectors: dict[int, torch.Tensor] = {}
        for rows, (flat, *pooled) in self.run(token_ids, token_budget, lambda _rows, flat: (flat,)):
            for row, states in zip(
                rows, flat.split([len(token_ids[row]) for row in rows]), strict=True
            ):
                found[row] = states
            for vector in pooled:
                vectors.update(zip(rows, vector, strict=True))
        return found, [vectors[row] for row in range(len(token_ids))] if vectors else []

    def encode_tokens(
        self, token_ids: Sequence[Sequence[int]], token_budget: int = TOKEN_BUDGET
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Encode captions that are tokens already, and give batches as they are done.

        On a GPU the copy of one batch overlaps the computation of the next.

        Args:
            token_ids: Ids of each caption, at least one.
            token_budget: Most tokens of one forward pass, padding included.

        Returns:
            Pairs: the rows of a batch, and their states one after the other, [N, W] on the CPU.
        """
        for rows, (flat, *_) in self.run(token_ids, token_budget, lambda _rows, flat: (flat,)):
            yield rows, flat

    def run(
        self, token_ids: Sequence[Sequence[int]], token_budget: int, finish: Finish
    ) -> Iterator[tuple[list[int], tuple[torch.Tensor, ...]]]:
        """Encode captions, work on a batch's states where they were computed, and bring the result
        to the CPU.

        Args:
            token_ids: Ids of each caption; one without any is in no batch.
            token_budget: Most tokens of one forward pass, padding included.
            finish: From the rows of a batch and their states [N, W] to the tensors that are wanted
                of them.

        Returns:
            Pairs: the rows of a batch, and its tensors on the CPU, behind them the pooled vectors
                [B, X] where the encoder gives such.
        """
        written = [row for row, ids in enumerate(token_ids) if ids]
        waiting: tuple[list[int], tuple[torch.Tensor, ...], torch.cuda.Event | None] | None = None
        for places in self.plan([len(token_ids[row]) for row in written], token_budget):
            rows = [written[place] for place in places]
            with torch.no_grad():
                found = finish(rows, self._forward([token_ids[row] for row in rows]))
            if self.trunk.pooled is not None:
                found = (*found, self.trunk.pooled)
            done = None
            if self.trunk.device.type == "cuda":
                found = tuple(_to_host(tensor) for tensor in found)
                done = torch.cuda.Event()
                done.record()
            if waiting:
                yield _arrived(*waiting)
            waiting = (rows, found, done)
        if waiting:
            yield _arrived(*waiting)

    def padding(
        self, token_ids: Sequence[Sequence[int]], token_budget: int = TOKEN_BUDGET
    ) -> Padding:
        """How much of the work for these captions is padding.

        Args:
            token_ids: Ids of each caption, at least one.
            token_budget: Most tokens of one forward pass, padding included.

        Returns:
            Useful and computed tokens.
        """
        lengths = [len(ids) for ids in token_ids if ids]
        if self.trunk.packs:
            return Padding(sum(lengths), sum(lengths))
        return padding_of(lengths, plan_batches(lengths, token_budget))

    def plan(self, lengths: Sequence[int], token_budget: int) -> list[list[int]]:
        """Which captions share a forward pass.

        Args:
            lengths: Tokens of each caption.
            token_budget: Most tokens of one forward pass, padding included.

        Returns:
            The rows of each batch.
        """
        plan = plan_packed if self.trunk.packs else plan_batches
        return plan(lengths, token_budget)

    def _forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        if self.trunk.packs:
            return self.trunk.after_context_packed(rows)
        lengths = torch.tensor([len(row) for row in rows])
        if self.spec.kind == "causal":
            # [B, T, W]
            mask = self._padding_mask(rows)
            states = self.trunk.after_context(self._padded(rows), mask, self._positions(mask))
            start = 0
        else:
            context, suffix = self.tokenizer.context_ids, self._unstored_suffix
            start = len(context)
            ids = self._padded([(*context, *row, *suffix) for row in rows])  # [B, C + T]
            valid = self._padding_mask(rows)
            if valid is None:
                # [B, C + T]
                valid = torch.arange(ids.shape[1]) < (lengths + start + len(suffix))[:, None]
            states = self.trunk.whole(ids, valid.to(ids.device))[:, start:]  # [B, T, W]
        keep = torch.arange(states.shape[1]) < lengths[:, None]  # [B, T]
        return states[keep.to(states.device)]  # [N, W]

    @property
    def _unstored_suffix(self) -> tuple[int, ...]:
        return self.tokenizer.suffix_ids if self.spec.text.suffix == "dropped" else ()

    def _padding_mask(self, rows: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """[B, C + T]: what rows attend to, where they hold padding that is masked; else None."""
        rule = self.spec.text.padding
        if rule is None or not rule.masked:
            return None
        context, longest = len(self.tokenizer.context_ids), max(map(len, rows))
        place = torch.arange(context + longest)  # [C + T]
        if rule.side == "left":
            first = torch.tensor([self.tokenizer.padding_before(row) for row in rows])  # [B]
            mask = place >= first[:, None]
        else:
            mask = (
                place
                < torch.tensor([context + self.tokenizer.without_padding(row) for row in rows])[
                    :, None
                ]
            )
        return mask.to(self.trunk.device)

    def _positions(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """[B, T] behind the context, where a spec puts its padding somewhere else than behind the
        text; mask: [B, C + T].
        """
        rule = self.spec.text.padding
        if rule is None or rule.position is None or mask is None:
            return None
        place = torch.arange(mask.shape[1], device=mask.device)  # [C + T]
        return torch.where(mask, place, rule.position)[:, len(self.tokenizer.context_ids) :]

    def _check_context(self) -> None:
        """Some models cut their cache to a window that their attention does not have, where the
        config names one.
        """
        row = self.tokenizer.tokenize(PADDING_TRIAL[:1])[0].token_ids
        start = len(self.tokenizer.context_ids)
        ids = self._padded([(*self.tokenizer.context_ids, *row)])
        with torch.inference_mode():
            # [T, W]
            whole = self.trunk.whole(ids, torch.ones_like(ids, dtype=torch.bool))[0, start:].float()
            behind = self.trunk.after_context(ids[:, start:])[0].float()
        difference = float((behind - whole).norm() / whole.norm())
        if difference > CONTEXT_TOLERANCE[self.spec.dtype]:
            raise InputError(
                f"encoder {self.spec.name}: {self.spec.folder}: {self.spec.model_type}: behind "
                "an instruction that was "
                f"read ahead, this model's states are off by {difference:.0%}; choose another "
                "model, or a template of "
                "{} alone"
            )

    def _check_padding(self) -> None:
        """Some models mix padding into the captions beside it (FNet, MobileBERT): states would
        depend on the batch.
        """
        short, long = (row.token_ids for row in self.tokenizer.tokenize(PADDING_TRIAL))
        if len(short) == len(long):
            return
        with torch.inference_mode():
            alone = self._forward([short]).float()  # [T, W]
            beside = self._forward([short, long])[: len(short)].float()
        difference = float((beside - alone).norm() / alone.norm())
        if difference > PADDING_TOLERANCE[self.spec.dtype]:
            raise InputError(
                f"encoder {self.spec.name}: {self.spec.folder}: {self.spec.model_type}: padding "
                "changes this model's "
                f"states (by {difference:.0%}), so they would depend on a batch's other "
                "captions; choose another model"
            )

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_id
        return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows]).to(
            self.trunk.device
        )


def load_encoder(encoder: str | Path | EncoderSettings, device: str | None = None) -> PromptEncoder:
    """A frozen LLM, ready to encode captions.

    Args:
        encoder: The name of an encoder that ships with the package (`smollm2`, `gemma3`), a YAML
            file with the keys
            of `EncoderSettings`, or the settings themselves.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU where there is one.

    Returns:
        The encoder, with the LLM's weights in memory. Its `encode(captions)` gives the states.

    Raises:
        InputError: No such encoder or file, settings that the model cannot serve, or a model that
            is neither here
            nor on the hub.
    """
    settings = (
        encoder if isinstance(encoder, EncoderSettings) else load_encoder_settings(str(encoder))
    )
    return PromptEncoder.load(resolve_encoder(settings, device), device)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on its way to pinned memory: there when the stream has come to it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
        tensor, non_blocking=True
    )


def _arrived(
    rows: list[int], found: tuple[torch.Tensor, ...], done: torch.cuda.Event | None
) -> tuple[list[int], tuple[torch.Tensor, ...]]:
    if done is not None:
        done.synchronize()
    return rows, found
