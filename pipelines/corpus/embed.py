"""Embedding a corpus: one LLM's states for every distinct caption, by Ray Data over units.

CPU tasks read and tokenise a unit, a pool of encoder actors computes and publishes it, and only its
commit record
comes back: states never pass through the object store. Which units are missing is asked of the
corpus first, so a finished family starts neither a model nor Ray, and an interrupted one goes on
where it stopped.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from lidit.config import EncoderSettings, PoolSettings
from lidit.errors import InputError, JobError, one_line
from lidit.progress import SILENT, Progress
from lidit.store import CommitRecord, Corpus, FamilyWriter, UnitStatistics, spec_differences
from lidit.text import CaptionTokens, EncoderSpec, PromptEncoder, PromptTokenizer, resolve_encoder
from lidit.text.embedding import check_tokenizer, encoded_tables, ensure_shared
from lidit.text.state_code import in_words
from pipelines.runtime import resources
from pipelines.runtime.kernels import avoid_plan_building
from pipelines.runtime.prometheus import EmbedMetrics

log = logging.getLogger(__name__)

ACTOR_RESTARTS = 3  # a caption that kills the process must not be tried for ever
# Retry tasks without limit; ACTOR_RESTARTS is the real limit. Until Ray notices a lost node, each
# retry fails at once, so a small limit is used up within a second.
TASK_RETRIES = -1
MOST_BLOCKS = 10_000
TOKENIZERS_PER_ACTOR = 2
CALLS_PER_ACTOR = 2  # one unit is packed and written while the next one computes
# A user's mistake travels as a row: Ray would strip an exception of its class and bury its text.
PROBLEM = pa.field("problem", pa.struct([("text", pa.string()), ("input", pa.bool_())]))
TOKENIZED = pa.schema(
    [
        ("unit", pa.int32()),
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
        ("truncated", pa.list_(pa.bool_())),
        ("control", pa.list_(pa.bool_())),
        ("merged", pa.list_(pa.bool_())),
        PROBLEM,
    ]
)
ENCODED = pa.schema(
    [
        ("unit", pa.int32()),
        ("tokens", pa.int64()),
        ("computed_tokens", pa.int64()),
        ("truncated", pa.int64()),
        ("seconds", pa.float64()),
        PROBLEM,
    ]
)


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
    spec = resolve_encoder(settings, _device(pool))
    check_tokenizer(opened, spec)
    writer = _writer(corpus, spec)
    computed: list[int] = []
    relatives = writer.relatives()
    if not writer.complete():
        for directory, fields in relatives.items():
            log.info(
                "%s is a new family; %s differs in: %s",
                writer.directory,
                directory,
                "; ".join(fields),
            )
        pending = writer.pending()
        if pending:
            resources.connect(max(cpus, math.ceil(pool.actors * pool.cpus) + 1))
            computed = _compute(EncodeJob(corpus, settings, spec, pool), pending, progress)
    # A fresh writer: the one above may remember that there were no shared states.
    provenance = {"encoder": settings.model_dump(mode="json"), "folder": spec.folder}
    manifest = _writer(corpus, spec).finish(extra=provenance)
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


def _device(pool: PoolSettings) -> str:
    return "cuda" if pool.gpus else "cpu"


def _writer(corpus: str, spec: EncoderSpec) -> FamilyWriter:
    return FamilyWriter.open_or_create(corpus, "text", spec.name, spec.to_dict())


def _compute(job: EncodeJob, pending: list[int], progress: Progress) -> list[int]:
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    pool = job.pool
    resources.check_resources(pool)
    # An actor of its own kind of device publishes the shared states; with several, exactly one must
    # come first. A code is told of before anything else is computed.
    coded = job.spec.storage == "coded"
    if (pool.actors > 1 or coded) and _writer(job.corpus, job.spec).shared() is None:
        raise_problem(ray.get(ray.remote(**resources.demands(pool))(prepare).remote(job)))
    if coded and (shared := _writer(job.corpus, job.spec).shared()) and shared.code:
        for line in in_words(shared.code):
            log.warning(line)  # a fact to see in time, before the units are computed
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
        return _consume(dataset, job, pending, progress)
    except ray.exceptions.RayError as error:
        reason = one_line(error)[-500:]
        raise JobError(
            f"embedding stopped: {reason}. Finished units are kept: run the same command again"
        ) from error


def _consume(dataset: Any, job: EncodeJob, pending: list[int], progress: Progress) -> list[int]:
    counts = Corpus.open(job.corpus).units["captions"].to_pylist()
    missing, total = sum(counts[unit] for unit in pending), sum(counts)
    done: list[int] = []
    captions, tokens, truncated = total - missing, 0, 0
    metrics = EmbedMetrics(job.spec.name)
    metrics.units_left(len(pending))
    progress.expect(total, done=captions)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
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


def _problem(unit: int, error: InputError | JobError) -> dict[str, Any]:
    return {"unit": unit, "problem": {"text": str(error), "input": isinstance(error, InputError)}}


def raise_problem(row: dict[str, Any]) -> None:
    if problem := row["problem"]:
        raise (InputError if problem["input"] else JobError)(problem["text"])


def _blocks(units: int) -> int:
    return min(units, MOST_BLOCKS)


# -- what runs on the cluster ----------------------------------------------------------------------


@dataclass(frozen=True)
class EncodeJob:
    """The arguments of every task and actor of one embedding."""

    corpus: str
    settings: EncoderSettings
    spec: EncoderSpec
    pool: PoolSettings

    def local_spec(self) -> EncoderSpec:
        """The spec with the model's folder on this node, which may have its own download.

        InputError where this node's files would make other states.
        """
        return _resolve_here(self.spec, self.settings, _device(self.pool))

    def load(self) -> PromptEncoder:
        import torch

        torch.set_num_threads(max(1, int(self.pool.cpus)))
        avoid_plan_building()
        return PromptEncoder.load(self.local_spec(), _device(self.pool))

    def writer(self) -> FamilyWriter:
        return FamilyWriter(self.corpus, "text", self.spec.name, self.spec.to_dict())


@functools.lru_cache(maxsize=2)
def _resolve_here(of_driver: EncoderSpec, settings: EncoderSettings, device: str) -> EncoderSpec:
    """This node's encoder, once per worker process: looking up the files' hashes is too slow for
    every unit.
    """
    # The driver's folder first: it is absolute where the settings may not be, and the hub is not
    # asked again. The folder can still hold another model, where nodes have disks of their own.
    folder = {"model": of_driver.folder} if Path(of_driver.folder).is_dir() else {}
    of_node = resolve_encoder(settings.model_copy(update=folder), device)
    if differing := spec_differences(of_driver.to_dict(), of_node.to_dict()):
        raise InputError(
            f"{settings.model}: this node has other model files than the node the job started on "
            f"({'; '.join(differing)}); give all nodes the same files"
        )
    return of_node


def prepare(job: EncodeJob) -> dict[str, Any]:
    """Publish the shared states."""
    try:
        ensure_shared(job.load(), job.writer(), job.pool.token_budget)
    except (InputError, JobError) as error:
        return _problem(-1, error)
    return {"problem": None}


@functools.lru_cache(maxsize=2)
def worker_tokenizer(spec: EncoderSpec) -> PromptTokenizer:
    # a large vocabulary takes seconds to parse: once per worker process
    return PromptTokenizer(spec)


def tokenize_units(batch: pa.Table, job: EncodeJob) -> pa.Table:
    """Unit numbers -> the token ids of their captions."""
    corpus = Corpus.open(job.corpus)
    rows = []
    for unit in batch["unit"].to_pylist():
        try:
            tokens = worker_tokenizer(job.local_spec()).tokenize(
                corpus.captions(unit)["text"].to_pylist()
            )
        except (InputError, JobError) as error:
            rows.append(_problem(unit, error))
            continue
        names = ("token_ids", "truncated", "control", "merged")
        columns = {name: [getattr(t, name) for t in tokens] for name in names}
        rows.append({"unit": unit, **columns})
    return pa.Table.from_pylist(rows, schema=TOKENIZED)


class EncodeUnits:
    """An actor: one model, units in, records out. Two calls at a time, of which one
    has the device.
    """

    def __init__(self, job: EncodeJob) -> None:
        self.job, self.device = job, threading.Lock()
        self.problem: InputError | JobError | None = None
        self.writer = job.writer()
        try:
            self.encoder = job.load()
            self.shared = ensure_shared(self.encoder, self.writer, job.pool.token_budget)
        except (InputError, JobError) as error:  # Ray would only report that the actor died
            self.problem = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._unit(row) for row in batch.to_pylist()], schema=ENCODED)

    def _unit(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["problem"]:
            return {"unit": row["unit"], "problem": row["problem"]}
        try:
            if self.problem:
                raise self.problem
            # Where a call died after publishing, or another job was faster, the record stands
            # already.
            record = self.writer.committed(row["unit"]) or self._encode(row)
        except (InputError, JobError) as error:
            return _problem(row["unit"], error)
        return {
            "unit": record.unit,
            "tokens": record.tokens,
            "computed_tokens": record.counts.get("computed_tokens", 0),
            "truncated": record.counts.get("truncated", 0),
            "seconds": record.seconds,
        }

    def _encode(self, row: dict[str, Any]) -> CommitRecord:
        statistics = UnitStatistics()
        columns = (row["token_ids"], row["truncated"], row["control"], row["merged"])
        captions = [CaptionTokens(tuple(ids), *marks) for ids, *marks in zip(*columns, strict=True)]
        tables = encoded_tables(
            self.encoder, self.shared, captions, statistics, self.job.pool.token_budget, self.device
        )
        return self.writer.publish(row["unit"], tables, statistics=statistics)
