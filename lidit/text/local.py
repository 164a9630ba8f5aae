"""A whole text family in this process, one unit after the other: what `lidit embed` does on a
cluster, the same bytes.

For few captions, in a notebook say: a cluster takes longer to start than they take to read.
"""

from __future__ import annotations

from lidit.config import EncoderSettings
from lidit.progress import SILENT, Progress
from lidit.store import Corpus, FamilyWriter, TextFamily, UnitStatistics
from lidit.text.embedding import check_tokenizer, encoded_tables, ensure_shared
from lidit.text.encoder import TOKEN_BUDGET, PromptEncoder
from lidit.text.specs import resolve_encoder


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
        _compute(opened, writer, PromptEncoder.load(spec, device), token_budget, progress)
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
