"""What Prometheus sees of a running job: every metric of ours, declared once, exported by Ray as `ray_<name>`.

`infra/monitoring` draws and alerts on these names; a test holds both sides together. Outside a running Ray the
functions do nothing, and they never raise for a number a job could meet: watching must not stop work.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

STEP_SECONDS = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0]


@dataclass(frozen=True)
class Declaration:
    """One metric: `kind` is counter, gauge or histogram; `tag` names its one label (corpus, encoder or run)."""

    kind: str
    tag: str
    description: str


METRICS = {
    "lidit_ingested_rows_total": Declaration("counter", "corpus", "Samples read and kept"),
    "lidit_quarantined_rows_total": Declaration("counter", "corpus", "Rows refused and written to quarantine"),
    "lidit_captions_total": Declaration("counter", "encoder", "Captions embedded and published"),
    "lidit_tokens_total": Declaration("counter", "encoder", "Caption tokens embedded, padding excluded"),
    "lidit_padding_waste_ratio": Declaration("gauge", "encoder", "Share of computed tokens that was padding"),
    "lidit_units_done_total": Declaration("counter", "encoder", "Units published by this job"),
    "lidit_units_left": Declaration("gauge", "encoder", "Units still to do"),
    "lidit_unit_seconds_total": Declaration("counter", "encoder", "Time encoders spent on published units"),
    "lidit_step_seconds": Declaration("histogram", "run", "Time of an optimizer step"),
    # Ray sums a histogram from the middles of its buckets, so shares of time need an exact counter beside it.
    "lidit_train_seconds_total": Declaration("counter", "run", "Time spent in optimizer steps"),
    "lidit_data_wait_seconds_total": Declaration("counter", "run", "Time steps waited for data"),
    "lidit_mfu": Declaration("gauge", "run", "Model FLOPs utilisation, 0 to 1"),
    "lidit_loss": Declaration("gauge", "run", "Training loss of the last finite step"),
    "lidit_loss_nonfinite_total": Declaration("counter", "run", "Steps whose loss was not finite"),
    "lidit_last_checkpoint_timestamp_seconds": Declaration("gauge", "run", "Unix time of the last complete checkpoint"),
}


@cache
def _metric(name: str) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    # Created on first use: a metric belongs to the Ray process that records it.
    declared = METRICS[name]
    tags = (declared.tag,)
    if declared.kind == "histogram":
        return Histogram(name, declared.description, boundaries=STEP_SECONDS, tag_keys=tags)
    return {"counter": Counter, "gauge": Gauge}[declared.kind](name, declared.description, tag_keys=tags)


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
    else:
        metric.observe(float(value), tags)


class IngestMetrics:
    """The ingest of one corpus. Call from the driver."""

    def __init__(self, corpus: str) -> None:
        self.corpus = corpus

    def source_read(self, kept: int, refused: int) -> None:
        """A source file was read: samples kept, rows refused."""
        _record("lidit_ingested_rows_total", kept, self.corpus)
        _record("lidit_quarantined_rows_total", refused, self.corpus)


class EmbedMetrics:
    """The embedding of one encoder. Call from ONE process per encoder (the driver), or gauges contradict each other."""

    def __init__(self, encoder: str) -> None:
        self.encoder = encoder

    def unit_done(self, captions: int, tokens: int, padded_tokens: int, seconds: float, left: int) -> None:
        """A unit was published: `tokens` real and `padded_tokens` computed tokens, `left` units still to do."""
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


class TrainMetrics:
    """One training run. Call from rank 0."""

    def __init__(self, run: str) -> None:
        self.run = run

    def step(self, seconds: float, data_wait_seconds: float, loss: float, mfu: float | None = None) -> None:
        """An optimizer step took `seconds`, of which `data_wait_seconds` were spent waiting for a batch."""
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
        _record("lidit_last_checkpoint_timestamp_seconds", time.time() if timestamp is None else timestamp, self.run)
