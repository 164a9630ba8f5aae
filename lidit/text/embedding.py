"""A text family's contents from one encoder: the shared states, and the tables of a unit, piece by
piece.

Needs no cluster: `pipelines.corpus.embed` calls this from its actors, a notebook may call it in a
loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch

from lidit.config import EncoderSettings
from lidit.config.settings import validate
from lidit.errors import InputError
from lidit.store import (
    Corpus,
    FamilyWriter,
    SharedStates,
    TextFamily,
    UnitStatistics,
    channel_statistics,
    shared_table,
    spec_differences,
    with_empty_pooled,
    with_pooled,
)
from lidit.store.packing import encode
from lidit.store.shared import with_code
from lidit.store.states import not_finite, stored_table
from lidit.text.encoder import TOKEN_BUDGET, PromptEncoder
from lidit.text.specs import EncoderSpec, resolve_encoder
from lidit.text.state_code import family_code
from lidit.text.tokenizer import CaptionTokens, PromptTokenizer

CALIBRATION_CAPTIONS = 1024
CALIBRATION_UNITS = 64
# states held at once, in the compute dtype: an actor's memory does not grow with the unit
PIECE_BYTES = 128 << 20
ERROR_ROWS = 64  # captions per piece whose storage error is measured


def calibration_captions(corpus: Corpus) -> list[str]:
    """The captions behind a family's mean and deviation: evenly spread over the corpus, the same
    for every encoder.
    """
    counts = corpus.units["captions"].to_pylist()
    units = _spread([unit for unit, count in enumerate(counts) if count], CALIBRATION_UNITS)
    share = -(-CALIBRATION_CAPTIONS // max(len(units), 1))
    captions: list[str] = []
    for unit in units:
        texts = corpus.captions(unit)["text"]
        captions += [texts[row].as_py() for row in _spread(list(range(len(texts))), share)]
    return captions


def check_tokenizer(corpus: Corpus, spec: EncoderSpec) -> None:
    """InputError for a tokenizer or template that cannot serve a spec, before a model is loaded and
    a folder made.

    A finished family needs neither.
    """
    families = corpus.text_families()
    if not any(handle.complete and handle.fingerprint == spec.fingerprint for handle in families):
        PromptTokenizer(spec)


def family_encoder(family: TextFamily, device: str = "cpu") -> PromptEncoder:
    """The encoder that made a family, found by the settings in its manifest. InputError where it is
    another one now.
    """
    settings = validate(
        EncoderSettings, family.manifest["extra"].get("encoder", {}), family.folder.location
    )
    exact = settings.model_copy(
        update={"dtype": family.spec["dtype"], "storage": family.spec["storage"]}
    )
    spec = resolve_encoder(exact, device)
    if spec.fingerprint != family.fingerprint:
        differing = "; ".join(spec_differences(family.spec, spec.to_dict()))
        raise InputError(
            f"{settings.model}: differs from the encoder that made {family.folder.location} "
            f"({differing})"
        )
    encoder = PromptEncoder.load(spec, device)
    require_prefix(encoder, family.shared(), family.folder.location)
    return encoder


def require_prefix(encoder: PromptEncoder, stored: SharedStates, where: str) -> None:
    """Raises InputError unless an encoder's instruction has the token ids that a family was
    computed behind.

    The spec's files determine them, but for what a chat template asks of the clock or of the
    installed transformers.
    """
    ids, _ = encoder.prefix_states()
    # Without a caption there is the suffix, where it is stored, and what stands for no caption.
    if tuple(ids) != stored.prefix_ids or encoder.tokenizer.empty_ids != stored.empty_ids:
        raise InputError(
            f"{where}: computed behind an instruction of other tokens ({len(stored.prefix_ids)} "
            f"stored, {len(ids)} "
            f"of encoder {encoder.spec.name}, or as many others): another transformers renders "
            "the chat template "
            "otherwise; install the earlier one, or delete this directory to compute it anew"
        )


def _spread(items: list[int], count: int) -> list[int]:
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


def ensure_shared(
    encoder: PromptEncoder, writer: FamilyWriter, token_budget: int = TOKEN_BUDGET
) -> SharedStates:
    """The family's shared states; computed and published by whoever comes first."""
    stored = writer.shared()
    prefix_ids, prefix = encoder.prefix_states()
    if stored is not None:
        require_prefix(encoder, stored, writer.folder.location)
        return stored
    empty_ids, empty = encoder.empty_states()
    captions = calibration_captions(writer.corpus)
    sample = [found.states for found in encoder.encode(captions, token_budget)]
    mean, deviation = channel_statistics(sample or [empty])
    table = shared_table(prefix_ids, prefix, empty_ids, empty, mean, deviation)
    if encoder.spec.storage == "coded":
        table = with_code(table, family_code(encoder, captions, sample, (mean, deviation)))
    pooled = encoder.empty_pooled() if encoder.spec.reading.pooled else None
    return writer.write_shared(table if pooled is None else with_empty_pooled(table, pooled))


def token_counts(captions: Sequence[CaptionTokens]) -> dict[str, int]:
    """What a record counts of its captions: those that were cut, and those that were read in
    another way than as they stand.
    """
    counts = {"truncated": sum(tokens.truncated for tokens in captions)}
    for name in ("control", "merged"):
        # absent otherwise: records stay as they were
        if count := sum(getattr(tokens, name) for tokens in captions):
            counts[name] = count
    return counts


def encoded_tables(
    encoder: PromptEncoder,
    shared: SharedStates,
    captions: Sequence[CaptionTokens],
    statistics: UnitStatistics,
    token_budget: int = TOKEN_BUDGET,
    device_lock: contextlib.AbstractContextManager[object] | None = None,
) -> Iterator[pa.Table]:
    """The rows of one unit in order, as tables of about `PIECE_BYTES` of states each; fills
    `statistics`.

    device_lock is held while the model runs and free while a piece is packed and written, so that
    another unit's computation can use that time.
    """
    spec = encoder.spec
    pieces = list(
        _pieces(captions, PIECE_BYTES // (spec.width * getattr(torch, spec.dtype).itemsize))
    )
    for piece in pieces or [[]]:
        ids = [tokens.token_ids for tokens in piece]
        stored = _Stored(encoder, shared, [len(row) for row in ids])
        with device_lock or contextlib.nullcontext():
            for rows, found in encoder.run(ids, token_budget, stored.pack):
                stored.take(rows, found)
        table = stored.table(ids)
        counts = token_counts(piece)
        counts["computed_tokens"] = encoder.padding(ids, token_budget).computed
        statistics.add(stored.extremes, counts=counts)
        statistics.add(
            stored.exact,
            table.slice(0, ERROR_ROWS),
            shared.mean,
            shared.deviation,
            code=shared.code,
        )
        yield table


class _Stored:
    """A piece's states as they are stored, packed where they were computed.

    int8 is half of what a GPU would send otherwise, and packing on a CPU takes longer than an LLM
    on a fast GPU.
    """

    def __init__(self, encoder: PromptEncoder, shared: SharedStates, lengths: list[int]) -> None:
        device = encoder.trunk.device
        self.storage, self.lengths = encoder.spec.storage, lengths
        self.mean, self.deviation = shared.mean.to(device), shared.deviation.to(device)
        self.on_cpu = (shared.mean, shared.deviation, shared.code)
        self.code = None if shared.code is None else shared.code.to(device)
        nothing = torch.empty(0, encoder.spec.width)
        self.values = [nothing] * len(lengths)  # [T, W] each
        # [T] each, or [T, G]; empty where there are none
        self.scales = [torch.empty(0)] * len(lengths)
        self.sums = [torch.empty(0)] * len(lengths)  # [T] each, not finite where a state is not
        # [T, W] each, whose storage error is measured
        self.exact = [nothing] * min(len(lengths), ERROR_ROWS)
        self.extremes: list[torch.Tensor] = []  # [2] each, of a batch
        vector = shared.empty_pooled  # only where the encoder gives vectors of whole captions
        self.pooled_width = 0 if vector is None else len(vector)
        # [X] each
        self.pooled = None if vector is None else [torch.zeros_like(vector)] * len(lengths)

    def pack(self, rows: list[int], flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """States [N, W] of a batch -> values, scales or none, sums, extremes [2], states to be
        measured.
        """
        values, scale = encode(flat, self.storage, self.mean, self.deviation, self.code)
        measured = [state for row, state in self._of(rows, flat) if row < ERROR_ROWS]
        extremes = torch.stack(torch.aminmax(flat))  # NaN where a value is
        return (
            values,
            flat.new_empty(0) if scale is None else scale,
            flat.float().sum(-1) if self.storage in ("int4", "coded") else flat.new_empty(0),
            extremes,
            torch.cat(measured) if measured else flat[:0],
        )

    def take(self, rows: list[int], found: tuple[torch.Tensor, ...]) -> None:
        """What `pack` gave, on the CPU. JobError where a state is no number."""
        values, scale, sums, extremes, exact, *pooled = found
        for kept, parts in ((self.values, values), (self.scales, scale), (self.sums, sums)):
            if len(parts) or not len(values):
                for row, part in self._of(rows, parts):
                    kept[row] = part
        for row, part in self._of([row for row in rows if row < ERROR_ROWS], exact):
            self.exact[row] = part
        if self.pooled is not None:
            for row, vector in zip(rows, pooled[0], strict=True):
                self.pooled[row] = vector
        if not extremes.isfinite().all():
            telling = {"int8": self.scales, "int4": self.sums, "coded": self.sums}.get(
                self.storage
            ) or self._floats()
            raise not_finite(next(row for row in sorted(rows) if not telling[row].isfinite().all()))
        self.extremes.append(extremes)

    def table(self, token_ids: Sequence[Sequence[int]]) -> pa.Table:
        """The piece's rows."""
        width = len(self.mean)
        # of no token: dtypes and shapes
        values, scale = encode(torch.empty(0, width), self.storage, *self.on_cpu)
        if kept := [value for value in self.values if len(value)]:
            values = torch.cat(kept)
        if scale is not None and (scales := [part for part in self.scales if len(part)]):
            scale = torch.cat(scales)
        table = stored_table(token_ids, values, scale, self.storage, width, self.on_cpu[-1])
        return table if self.pooled is None else with_pooled(table, self.pooled, self.pooled_width)

    def _of(self, rows: list[int], flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        return zip(rows, flat.split([self.lengths[row] for row in rows]), strict=True)

    def _floats(self) -> list[torch.Tensor]:
        return [v.view(torch.bfloat16) if v.dtype == torch.uint16 else v for v in self.values]


def _pieces(captions: Sequence[CaptionTokens], tokens: int) -> Iterator[list[CaptionTokens]]:
    piece: list[CaptionTokens] = []
    filled = 0
    for caption in captions:
        if piece and filled + len(caption.token_ids) > tokens:
            yield piece
            piece, filled = [], 0
        piece.append(caption)
        filled += len(caption.token_ids)
    if piece:
        yield piece
