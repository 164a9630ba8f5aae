"""What embedding runs on a cluster: tasks that tokenise a unit, actors that compute and publish it.

A unit's states go from the actor to the corpus; what comes back is its record's numbers, or what is
wrong.
"""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lidit.config import EncoderSettings, PoolSettings
from lidit.errors import InputError, JobError
from lidit.store import CommitRecord, Corpus, FamilyWriter, UnitStatistics, spec_differences
from lidit.text import CaptionTokens, EncoderSpec, PromptEncoder, PromptTokenizer, resolve_encoder
from lidit.text.embedding import encoded_tables, ensure_shared
from lidit.text.state_code import in_words
from pipelines.runtime.kernels import avoid_plan_building

log = logging.getLogger(__name__)

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
        return _resolve_here(self.spec, self.settings, device_of(self.pool))

    def load(self) -> PromptEncoder:
        import torch

        torch.set_num_threads(max(1, int(self.pool.cpus)))
        avoid_plan_building()
        return PromptEncoder.load(self.local_spec(), device_of(self.pool))

    def writer(self) -> FamilyWriter:
        return FamilyWriter(self.corpus, "text", self.spec.name, self.spec.to_dict())


def device_of(pool: PoolSettings) -> str:
    """Where a pool's actors compute."""
    return "cuda" if pool.gpus else "cpu"


def open_writer(corpus: str, spec: EncoderSpec) -> FamilyWriter:
    """The family that an encoder makes of a corpus."""
    return FamilyWriter.open_or_create(corpus, "text", spec.name, spec.to_dict())


def provenance(settings: EncoderSettings, spec: EncoderSpec) -> dict[str, Any]:
    """What a family says of the encoder that made it."""
    return {"encoder": settings.model_dump(mode="json"), "folder": spec.folder}


def tell_code(job: EncodeJob) -> None:
    """What a coded family takes and loses: a fact to see in time, before its units are computed."""
    shared = open_writer(job.corpus, job.spec).shared()
    if shared is not None and shared.code is not None:
        for line in in_words(shared.code):
            log.warning(line)


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


def _problem(unit: int, error: InputError | JobError) -> dict[str, Any]:
    return {"unit": unit, "problem": {"text": str(error), "input": isinstance(error, InputError)}}


def raise_problem(row: dict[str, Any]) -> None:
    """Raise what a task answered instead of a result."""
    if problem := row["problem"]:
        raise (InputError if problem["input"] else JobError)(problem["text"])
