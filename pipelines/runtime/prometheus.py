"""What Prometheus sees of a running job: every metric of ours, declared once, exported by Ray as
`ray_<name>`.

`infra/monitoring` draws and alerts on these names; a test holds both sides together. Outside a
running Ray the functions do nothing, and they never raise for a number a job could meet: watching
must not stop work.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

PASS_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
REPEAT_S = 1.0
STEP_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True)
class Declaration:
    """One metric: `kind` is counter, gauge or histogram; `tag` names its one label; boundaries: a
    histogram's.
    """

    kind: str
    tag: str
    description: str
    boundaries: tuple[float, ...] = STEP_SECONDS


METRICS = {
    "lidit_ingested_rows_total": Declaration("counter", "corpus", "Samples read and kept"),
    "lidit_quarantined_rows_total": Declaration(
        "counter", "corpus", "Rows refused and written to quarantine"
    ),
    "lidit_captions_total": Declaration("counter", "encoder", "Captions embedded and published"),
    "lidit_tokens_total": Declaration(
        "counter", "encoder", "Caption tokens embedded, padding excluded"
    ),
    "lidit_padding_waste_ratio": Declaration(
        "gauge", "encoder", "Share of computed tokens that was padding"
    ),
    "lidit_units_done_total": Declaration("counter", "encoder", "Units published by this job"),
    "lidit_units_left": Declaration("gauge", "encoder", "Units still to do"),
    "lidit_unit_seconds_total": Declaration(
        "counter", "encoder", "Time encoders spent on published units"
    ),
    "lidit_online_ahead_windows": Declaration(
        "gauge",
        "encoder",
        "Whole windows on disk beyond the slowest reader's own; -1 while readers wait",
    ),
    "lidit_online_wanted_actors": Declaration(
        "gauge", "encoder", "Encoder actors that would keep readers supplied"
    ),
    "lidit_online_units": Declaration("gauge", "encoder", "Units of a rolling family on disk"),
    "lidit_step_seconds": Declaration("histogram", "run", "Time of an optimizer step"),
    # Ray sums a histogram from the middles of its buckets, so shares of time need an exact counter
    # beside it.
    "lidit_train_seconds_total": Declaration("counter", "run", "Time spent in optimizer steps"),
    "lidit_data_wait_seconds_total": Declaration("counter", "run", "Time steps waited for data"),
    "lidit_mfu": Declaration("gauge", "run", "Model FLOPs utilisation, 0 to 1"),
    "lidit_loss": Declaration("gauge", "run", "Training loss of the last finite step"),
    "lidit_loss_nonfinite_total": Declaration("counter", "run", "Steps whose loss was not finite"),
    "lidit_last_checkpoint_timestamp_seconds": Declaration(
        "gauge", "run", "Unix time of the last complete checkpoint"
    ),
    "lidit_requests_total": Declaration(
        "counter", "outcome", "Requests for pictures, by how they ended"
    ),
    "lidit_request_seconds": Declaration(
        "histogram", "size", "Time from a request to its last picture"
    ),
    "lidit_first_preview_seconds": Declaration(
        "histogram", "model", "Time from a request to its first preview"
    ),
    "lidit_queue_units": Declaration(
        "gauge", "model", "Compute units, pixels x steps, that wait or are in work"
    ),
    "lidit_pass_seconds": Declaration(
        "histogram", "size", "Time of a forward pass: a step", PASS_SECONDS
    ),
    "lidit_passes_total": Declaration("counter", "model", "Forward passes of the network"),
    "lidit_pass_rows_total": Declaration(
        "counter", "model", "Rows of those passes; a guided picture has two"
    ),
    "lidit_verdicts_total": Declaration(
        "counter", "verdict", "Prompts and pictures judged: GUARD passed, refused, failed"
    ),
    "lidit_unused_steps_total": Declaration(
        "counter", "model", "Steps of pictures that nobody got"
    ),
    "lidit_prompt_states_total": Declaration(
        "counter", "source", "States of prompts, from the cache or an LLM"
    ),
}


@cache
def _metric(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    # Created on first use: a metric belongs to the Ray process that records it.
    declared = METRICS[name]
    tags = (declared.tag,)
    if declared.kind == "histogram":
        return Histogram(
            name, declared.description, boundaries=list(declared.boundaries), tag_keys=tags
        )
    return {"counter": Counter, "gauge": Gauge}[declared.kind](
        name, declared.description, tag_keys=tags
    )


def _record(name: str, value: float, tag: str) -> None:
    ray = sys.modules.get("ray")  # a process that has not imported it is no part of a cluster
    if ray is None or not ray.is_initialized() or not math.isfinite(value):
        return
    metric, tags, kind = _metric(name), {METRICS[name].tag: tag}, METRICS[name].kind
    if kind == "counter":
        if value > 0:  # Ray refuses to count nothing
            metric.inc(float(value), tags)
    elif kind == "gauge":
        metric.set(float(value), tags)
        _gauges[name, tag] = float(value)
        _repeat_gauges()
    else:
        metric.observe(float(value), tags)


# Ray exports a gauge once for each time it is set. What does not change, such as a queue that
# stands, would be gone from Prometheus when somebody should be told of it.
_gauges: dict[tuple[str, str], float] = {}


@cache
def _repeat_gauges() -> None:
    """Set every gauge of this process again and again, from now on."""

    def repeat() -> None:
        while True:
            time.sleep(REPEAT_S)  # within the time between two scrapes
            ray = sys.modules["ray"]
            if not ray.is_initialized():  # another Ray of this process begins without them
                _gauges.clear()
            for (name, tag), value in list(_gauges.items()):
                _metric(name).set(value, {METRICS[name].tag: tag})

    threading.Thread(target=repeat, name="gauges", daemon=True).start()


class IngestMetrics:
    """The ingest of one corpus. Call from the driver."""

    def __init__(self, corpus: str) -> None:
        self.corpus = corpus

    def source_read(self, kept: int, refused: int) -> None:
        """A source file was read: samples kept, rows refused."""
        _record("lidit_ingested_rows_total", kept, self.corpus)
        _record("lidit_quarantined_rows_total", refused, self.corpus)


class EmbedMetrics:
    """The embedding of one encoder. Call from ONE process per encoder (the driver), or gauges
    contradict each other.
    """

    def __init__(self, encoder: str) -> None:
        self.encoder = encoder

    def unit_done(
        self, captions: int, tokens: int, padded_tokens: int, seconds: float, left: int
    ) -> None:
        """A unit was published: `tokens` real and `padded_tokens` computed tokens, `left` units
        still to do.
        """
        _record("lidit_captions_total", captions, self.encoder)
        _record("lidit_tokens_total", tokens, self.encoder)
        if padded_tokens > 0:
            _record("lidit_padding_waste_ratio", 1.0 - tokens / padded_tokens, self.encoder)
        _record("lidit_units_done_total", 1, self.encoder)
        _record("lidit_unit_seconds_total", seconds, self.encoder)
        self.units_left(left)

    def units_left(self, left: int) -> None:
        """Call once at the start too, so that a job stuck before its first unit is seen."""
        _record("lidit_units_left", left, self.encoder)

    def rolling(self, ahead: int, wanted_actors: int, on_disk: int) -> None:
        """How a rolling family stands: windows ready, encoders that would do, units on disk."""
        _record("lidit_online_ahead_windows", ahead, self.encoder)
        _record("lidit_online_wanted_actors", wanted_actors, self.encoder)
        _record("lidit_online_units", on_disk, self.encoder)


class TrainMetrics:
    """One training run. Call from rank 0."""

    def __init__(self, run: str) -> None:
        self.run = run

    def step(
        self, seconds: float, data_wait_seconds: float, loss: float, mfu: float | None = None
    ) -> None:
        """An optimizer step took `seconds`, of which `data_wait_seconds` were spent waiting for a
        batch.
        """
        _record("lidit_step_seconds", seconds, self.run)
        _record("lidit_train_seconds_total", seconds, self.run)
        _record("lidit_data_wait_seconds_total", data_wait_seconds, self.run)
        _record("lidit_loss", loss, self.run)
        if mfu is not None:
            _record("lidit_mfu", mfu, self.run)

    def not_finite(self) -> None:
        """A step was not taken, for its loss was not finite on some worker."""
        _record("lidit_loss_nonfinite_total", 1, self.run)

    def checkpoint_saved(self, timestamp: float | None = None) -> None:
        """A checkpoint became complete, now or at the given unix time."""
        _record(
            "lidit_last_checkpoint_timestamp_seconds",
            time.time() if timestamp is None else timestamp,
            self.run,
        )


class RequestMetrics:
    """The requests of one served model. Call from the ledger."""

    def __init__(self, model: str) -> None:
        self.model = model

    def queue(self, units: int) -> None:
        """So many compute units wait or are in work."""
        _record("lidit_queue_units", units, self.model)

    def ended(self, outcome: str, size: str, seconds: float, unused_steps: int = 0) -> None:
        """A request ended. outcome: "drawn", or the audit log's word; unused_steps: taken for
        nothing.
        """
        _record("lidit_requests_total", 1, outcome)
        _record("lidit_unused_steps_total", unused_steps, self.model)
        if outcome == "drawn":
            _record("lidit_request_seconds", seconds, size)

    def previewed(self, seconds: float) -> None:
        """The first preview of a request came."""
        _record("lidit_first_preview_seconds", seconds, self.model)


class EngineMetrics:
    """The work of one served model. Call from the process that does it, with what it has counted so
    far.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._told: dict[str, int] = {}

    def passed(self, size: str, rows: int, seconds: float) -> None:
        """A forward pass was made; size: of its pictures, in pixels."""
        _record("lidit_passes_total", 1, self.model)
        _record("lidit_pass_rows_total", rows, self.model)
        _record("lidit_pass_seconds", seconds, size)

    def prompt_states(self, hits: int, misses: int) -> None:
        """Of a cache of prompts' states."""
        self._count("lidit_prompt_states_total", hits, "cache")
        self._count("lidit_prompt_states_total", misses, "llm")

    def _count(self, name: str, total: int, tag: str) -> None:
        """What has come since the last call."""
        key = f"{name} {tag}"
        _record(name, total - self._told.get(key, 0), tag)
        self._told[key] = total


def judged(guard: str, verdict: str, count: int) -> None:
    """A guard looked at so many things. verdict: "passed", "refused", or "failed" where it could
    not.
    """
    _record("lidit_verdicts_total", count, f"{guard} {verdict}")
