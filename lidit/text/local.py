"""A whole text family in this process, one unit after the other: what `lidit embed` does on a
cluster, the same bytes.

For few captions, in a notebook say: a cluster takes longer to start than they take to read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lidit.config import EncoderSettings
from lidit.progress import SILENT, Progress
from lidit.store import Corpus, FamilyWriter, TextFamily, UnitStatistics
from lidit.text.embedding import (
    PIECE_BYTES,
    check_tokenizer,
    encoded_tables,
    ensure_shared,
)
from lidit.text.encoder import TOKEN_BUDGET, PromptEncoder
from lidit.text.specs import EncoderSpec, resolve_encoder
from lidit.text.tokenizer import PromptTokenizer
from lidit.text.trunk import Trunk


def embed_here(
    corpus: str,
    settings: EncoderSettings,
    device: str = "cpu",
    token_budget: int = TOKEN_BUDGET,
    progress: Progress = SILENT,
) -> TextFamily:
    """Compute and publish what is missing of one text family; a finished one loads no model.

    progress: counts captions. Raises InputError for no corpus, no model, or settings that the model
    cannot serve.
    """
    opened = Corpus.open(corpus)
    spec = resolve_encoder(settings, device)
    check_tokenizer(opened, spec)
    writer = FamilyWriter.open_or_create(opened.folder.location, "text", spec.name, spec.to_dict())
    if not writer.complete():
        _compute(opened, writer, _OnceEncoder.load(spec, device), token_budget, progress)
        provenance = {"encoder": settings.model_dump(mode="json"), "folder": spec.folder}
        FamilyWriter(opened.folder.location, "text", spec.name, spec.to_dict()).finish(
            extra=provenance
        )
    return Corpus.open(opened.folder.location).text_family(writer.directory)


def _compute(
    corpus: Corpus,
    writer: FamilyWriter,
    encoder: PromptEncoder,
    token_budget: int,
    progress: Progress,
) -> None:
    shared = ensure_shared(encoder, writer, token_budget)
    counts = corpus.units["captions"].to_pylist()
    pending = writer.pending()
    total = sum(counts)
    done = total - sum(counts[unit] for unit in pending)
    progress.expect(total, done)
    for unit in pending:
        captions = encoder.tokenizer.tokenize(corpus.captions(unit)["text"].to_pylist())
        statistics = UnitStatistics()
        writer.publish(
            unit,
            encoded_tables(encoder, shared, captions, statistics, token_budget),
            statistics=statistics,
        )
        done += counts[unit]
        progress.update(done)


class _OnceEncoder(PromptEncoder):
    """An encoder that gives a batch it has just computed once more without computing it.

    The captions behind a family's mean and deviation are all captions of a small corpus, and its
    only unit is the same batches again.
    """

    def __init__(self, spec: EncoderSpec, tokenizer: PromptTokenizer, trunk: Trunk) -> None:
        self._kept: dict[tuple[tuple[int, ...], ...], tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._room = PIECE_BYTES  # a larger unit is cut into other batches
        super().__init__(spec, tokenizer, trunk)

    def _forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        batch = tuple(map(tuple, rows))
        if batch in self._kept:
            states, self.trunk.pooled = self._kept.pop(batch)
            return states
        states = super()._forward(rows)
        self._room -= states.nbytes
        if self._room >= 0:
            self._kept[batch] = (states, self.trunk.pooled)
        return states
