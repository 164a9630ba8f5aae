"""Embedding with each distinct caption of the corpus computed once, however many units repeat it.

The captions that no earlier unit has are a corpus of their own, CORPUS/distinct, which is embedded
as any other; the units are then put together from its states, without the LLM. Both keep what is
finished.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from lidit.config import EncoderSettings, PoolSettings
from lidit.errors import JobError
from lidit.progress import SILENT, Progress
from lidit.store import Corpus, FamilyWriter, UnitStatistics
from lidit.store.distinct import FOLDER, CaptionIndex, Ints, assembled_tables, distinct_corpus
from lidit.store.loss import StorageLoss
from lidit.store.manifest import FAMILY_FILE
from lidit.store.writer import SHARED_FILE
from lidit.text import resolve_encoder
from lidit.text.embedding import PIECE_BYTES, check_tokenizer, token_counts
from pipelines.corpus.embed import EmbedSummary, run_embed
from pipelines.corpus.encode_units import (
    EncodeJob,
    device_of,
    open_writer,
    prepare,
    provenance,
    raise_problem,
    worker_tokenizer,
)
from pipelines.runtime import resources
from pipelines.runtime.tasks import in_tasks


def embed_corpus(
    corpus: str,
    settings: EncoderSettings,
    pool: PoolSettings | None = None,
    progress: Progress = SILENT,
    cpus: int = 1,
) -> EmbedSummary:
    """`run_embed`, or with `pool.distinct` the same family from fewer captions; its arguments and
    errors.
    """
    pool = pool or PoolSettings()
    opened = Corpus.open(corpus)
    if not pool.distinct or opened.num_units < 2:
        return run_embed(corpus, settings, pool, progress, cpus)
    started, location = time.monotonic(), opened.folder.location
    spec = resolve_encoder(settings, device_of(pool))
    check_tokenizer(opened, spec)
    writer = open_writer(location, spec)
    pending = [] if writer.complete() else writer.pending()
    apart = opened.folder.child(FOLDER).child("text").child(writer.directory)
    # A mended unit is computed alone: the states of all distinct captions are gone by then.
    if not pending or (len(pending) < opened.num_units and not apart.exists(FAMILY_FILE)):
        return run_embed(corpus, settings, pool, progress, cpus)
    job = EncodeJob(location, settings, spec, pool)

    # The shared states are of the whole corpus, whoever computes its captions.
    resources.connect(max(cpus, math.ceil(pool.actors * pool.cpus) + 1))
    resources.check_resources(pool)
    if writer.shared() is None:
        import ray

        raise_problem(ray.get(ray.remote(**resources.demands(pool))(prepare).remote(job)))
    index = CaptionIndex.of(opened)
    once = distinct_corpus(opened, index)
    copy = open_writer(once.folder.location, spec)
    copy.write_shared(writer.folder.read_table(SHARED_FILE))
    computed = run_embed(once.folder.location, settings, pool, progress, cpus)

    calls = (
        (f"unit {unit}", (job, once.folder.location, unit, *index.unit(unit))) for unit in pending
    )
    for _ in in_tasks(assemble_unit, calls):
        pass
    writer.finish(extra=provenance(settings, spec))
    copy.folder.remove_tree()
    return replace(
        run_embed(corpus, settings, pool),
        computed_units=len(pending),
        seconds=time.monotonic() - started,
        padding_waste=computed.padding_waste,
    )


def assemble_unit(job: EncodeJob, once: str, unit: int, owners: Ints, rows: Ints) -> int:
    """Publish one unit of the family from the states of the distinct captions.

    Its record's extremes are those of the units that its captions come from, its storage error is
    that of the captions that are new in it.
    """
    writer = job.writer()
    if writer.committed(unit) is None:
        family = Corpus.open(once).text_family(writer.directory)
        texts = writer.corpus.captions(unit)["text"].to_pylist()
        copy = FamilyWriter(once, "text", job.spec.name, job.spec.to_dict())
        records = [copy.committed(int(owner)) for owner in np.unique(owners)]
        statistics = UnitStatistics(
            counts=token_counts(worker_tokenizer(job.local_spec()).tokenize(texts))
        )
        for record in records:
            if record is None:
                raise JobError(
                    f"{family.folder.location}: a unit is gone; run the same command again"
                )
            statistics.minimum = min(statistics.minimum, record.minimum)
            statistics.maximum = max(statistics.maximum, record.maximum)
            if record.unit == unit and record.error:
                statistics.error = StorageLoss(**record.error)  # type: ignore[arg-type]
        tables = assembled_tables(family, owners, rows, PIECE_BYTES // (2 * family.width))
        writer.publish(unit, tables, statistics=statistics)
    return unit
