"""Embedding a corpus: one LLM's states for every distinct caption, by Ray Data over units.

CPU tasks read and tokenise a unit, a pool of encoder actors computes and publishes it, and only its
commit record
comes back: states never pass through the object store. Which units are missing is asked of the
corpus first, so a finished family starts neither a model nor Ray, and an interrupted one goes on
where it stopped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa

from lidit.config import EncoderSettings, PoolSettings
from lidit.errors import JobError, one_line
from lidit.progress import SILENT, Progress
from lidit.store import Corpus, FamilyWriter
from lidit.store.files.owner import owned
from lidit.store.manifest import ROLLING_FILE
from lidit.text import resolve_encoder
from lidit.text.embedding import check_tokenizer
from pipelines.corpus.encode_units import (
    EncodeJob,
    EncodeUnits,
    device_of,
    open_writer,
    prepare,
    provenance,
    raise_problem,
    tell_code,
    tokenize_units,
)
from pipelines.runtime import resources
from pipelines.runtime.prometheus import EmbedMetrics

log = logging.getLogger(__name__)

ACTOR_RESTARTS = 3  # a caption that kills the process must not be tried for ever
# Retry tasks without limit; ACTOR_RESTARTS is the real limit. Until Ray notices a lost node, each
# retry fails at once, so a small limit is used up within a second.
TASK_RETRIES = -1
MOST_BLOCKS = 10_000
TOKENIZERS_PER_ACTOR = 2
CALLS_PER_ACTOR = 2  # one unit is packed and written while the next one computes


@dataclass(frozen=True)
class EmbedSummary:
    """One finished family. computed_units: by this call; relatives: other families of the name ->
    differing fields.
    """

    name: str
    directory: str
    fingerprint: str
    units: int
    computed_units: int
    captions: int
    tokens: int
    truncated: int
    control: int
    merged: int
    max_tokens: int
    bytes: int
    seconds: float
    padding_waste: float
    storage_error: dict[str, float] = field(default_factory=dict)
    relatives: dict[str, list[str]] = field(default_factory=dict)


def run_embed(
    corpus: str,
    settings: EncoderSettings,
    pool: PoolSettings | None = None,
    progress: Progress = SILENT,
    cpus: int = 1,
) -> EmbedSummary:
    """Compute and publish what is missing of one text family. Call again after any interruption.

    progress: counts captions; cpus: at least so many logical CPUs for an embedded Ray that is
    started here.

    Raises:
        InputError: no corpus, no model, settings the model cannot serve, resources this machine
            does not have.
        JobError: the disk is full, an encoder died too often, states are not finite; finished units
            are kept.
    """
    pool = pool or PoolSettings()
    started = time.monotonic()
    # Before any model is fetched; and absolute, for workers that were started in another folder.
    opened = Corpus.open(corpus)
    corpus = opened.folder.location
    spec = resolve_encoder(settings, device_of(pool))
    check_tokenizer(opened, spec)
    writer = open_writer(corpus, spec)
    computed: list[int] = []
    relatives = writer.relatives()
    with _alone(writer):
        if not writer.complete():
            for directory, fields in relatives.items():
                log.info(
                    "%s is a new family; %s differs in: %s",
                    writer.directory,
                    directory,
                    "; ".join(fields),
                )
            pending = writer.pending()
            job = EncodeJob(corpus, settings, spec, pool)
            if pending and resources.is_small(pool, len(pending)):
                computed = _compute_here(job, pending, progress)
            elif pending:
                resources.connect(max(cpus, math.ceil(pool.actors * pool.cpus) + 1))
                computed = _compute(job, pending, progress)
        # A fresh writer: the one above may remember that there were no shared states.
        manifest = open_writer(corpus, spec).finish(extra=provenance(settings, spec))
    counts = manifest["counts"]
    work = counts.get("computed_tokens", 0)
    return EmbedSummary(
        name=spec.name,
        directory=writer.directory,
        fingerprint=spec.fingerprint,
        units=manifest["units"],
        computed_units=len(computed),
        captions=manifest["rows"],
        tokens=manifest["tokens"],
        truncated=counts.get("truncated", 0),
        control=counts.get("control", 0),
        merged=counts.get("merged", 0),
        max_tokens=spec.max_tokens,
        bytes=manifest["bytes"],
        seconds=time.monotonic() - started,
        padding_waste=1 - manifest["tokens"] / work if work else 0.0,
        storage_error=manifest.get("storage_error", {}),
        relatives=relatives,
    )


def _alone(writer: FamilyWriter) -> contextlib.AbstractContextManager[None]:
    """Of a rolling family units are deleted as they are read: it becomes a whole one when nobody
    does that.
    """
    rolling = writer.folder.exists(ROLLING_FILE) and not writer.complete()
    return owned(writer.folder, "computed as a whole") if rolling else contextlib.nullcontext()


def _compute_here(job: EncodeJob, pending: list[int], progress: Progress) -> list[int]:
    """What a cluster's actor does, in this process: the same code, so the same bytes."""
    import torch

    threads = torch.get_num_threads()
    try:
        encode = EncodeUnits(job)
        if encode.problem:
            raise encode.problem
        tell_code(job)
        units = (tokenize_units(pa.table({"unit": [unit]}), job) for unit in pending)
        return _consume(map(encode, units), job, pending, progress)
    finally:
        # as many as the actor had computed with; whoever called has their own again
        torch.set_num_threads(threads)


def _compute(job: EncodeJob, pending: list[int], progress: Progress) -> list[int]:
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    pool = job.pool
    resources.check_resources(pool)
    # An actor of its own kind of device publishes the shared states; with several, exactly one must
    # come first. A code is told of before anything else is computed.
    coded = job.spec.storage == "coded"
    if (pool.actors > 1 or coded) and open_writer(job.corpus, job.spec).shared() is None:
        raise_problem(ray.get(ray.remote(**resources.demands(pool))(prepare).remote(job)))
    tell_code(job)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # it would pickle what Arrow cannot hold
    context.enable_fallback_to_arrow_object_ext_type = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    blocks = _blocks(len(pending))
    dataset = ray.data.from_items([{"unit": unit} for unit in pending], override_num_blocks=blocks)
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated", module=__name__)
    dataset = dataset.map_batches(
        tokenize_units,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"job": job},
        compute=TaskPoolStrategy(size=min(TOKENIZERS_PER_ACTOR * pool.actors, blocks)),
        # actors that hold every CPU would wait for these tasks for ever, and these for a CPU
        num_cpus=0,
    ).map_batches(
        EncodeUnits,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=pool.actors,
            max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
            max_tasks_in_flight_per_actor=CALLS_PER_ACTOR,
            enable_true_multi_threading=True,
        ),
        fn_constructor_kwargs={"job": job},
        max_restarts=ACTOR_RESTARTS,
        max_task_retries=TASK_RETRIES,
        **resources.demands(pool),
    )
    try:
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        return _consume(batches, job, pending, progress)
    except ray.exceptions.RayError as error:
        reason = one_line(error)[-500:]
        raise JobError(
            f"embedding stopped: {reason}. Finished units are kept: run the same command again"
        ) from error


def _consume(
    batches: Iterable[pa.Table], job: EncodeJob, pending: list[int], progress: Progress
) -> list[int]:
    """The units of the batches, told as they come. Raises what a batch says is wrong."""
    counts = Corpus.open(job.corpus).units["captions"].to_pylist()
    missing, total = sum(counts[unit] for unit in pending), sum(counts)
    done: list[int] = []
    captions, tokens, truncated = total - missing, 0, 0
    metrics = EmbedMetrics(job.spec.name)
    metrics.units_left(len(pending))
    progress.expect(total, done=captions)
    for batch in batches:
        for row in batch.to_pylist():
            raise_problem(row)
            done.append(row["unit"])
            metrics.unit_done(
                captions=counts[row["unit"]],
                tokens=row["tokens"],
                padded_tokens=row["computed_tokens"],
                seconds=row["seconds"],
                left=len(pending) - len(done),
            )
            captions += counts[row["unit"]]
            tokens += row["tokens"]
            truncated += row["truncated"]
            progress.update(
                captions,
                f"{tokens:,} tokens" + (f", {truncated:,} captions cut" if truncated else ""),
            )
    return done


def _blocks(units: int) -> int:
    return min(units, MOST_BLOCKS)
