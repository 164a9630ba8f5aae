"""The metrics of a training run: losses, speed, MFU, memory; sent by rank 0."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lidit.config import RunRecipe
from lidit.data.feed import Batches
from pipelines.runtime.prometheus import TrainMetrics
from pipelines.tracking import RunHandle, Tracker
from pipelines.tracking.machine import MachineLoad
from pipelines.training.engine import Batch, ShardedEngine, StepResult
from pipelines.training.mfu import Flops, utilisation
from pipelines.training.schedule import learning_rate


class TrainingMetrics:
    """Losses and speed between two log lines, for the tracker, the board and Prometheus.

    Every worker has one; those of other ranks than 0 send nothing.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        engine: ShardedEngine[Any],
        feed: Batches[Any],
        handle: RunHandle | None,
        board: Any,
    ) -> None:
        self.recipe, self.engine, self.feed = recipe, engine, feed
        self.is_rank_zero = engine.rank == 0
        self.tracker = Tracker(handle) if self.is_rank_zero and handle else None
        self.board, self.prometheus = board, TrainMetrics(recipe.name)
        self.machine = MachineLoad()
        # the newest one, on every rank: checkpoints are compared by it
        self.validation_loss = math.inf
        self._reset()

    def _reset(self) -> None:
        self.began, self.waited = time.perf_counter(), self.feed.waited
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.steps = self.images = self.tokens = 0
        self.flops: Flops | None = Flops(0.0, 0.0)

    def step(self, batch: Batch, result: StepResult, seconds: float, data_wait: float) -> None:
        """Count a step that was taken or skipped; log every `train.log_every` steps and the last.

        seconds: of the whole step, `data_wait` among them: the time the loop waited for the batch.
        """
        if not self.is_rank_zero:
            return
        if result.finite:
            self.losses.append(result.loss)
            self.norms.append(result.gradient_norm)
        self.steps += 1
        self.images += self.engine.recipe.train.batch_size
        self.tokens += batch.tokens * self.engine.world_size
        flops = self.engine.step_flops(batch)
        self.flops = self.flops.plus(flops) if self.flops and flops else None
        mfu = self._mfu(flops.useful, seconds) if flops else None
        self.prometheus.step(seconds, data_wait, result.loss, mfu)

        done = batch.step + 1
        if done % self.recipe.train.log_every and done != self.recipe.train.steps:
            return
        elapsed = time.perf_counter() - self.began
        seen = done * self.recipe.train.batch_size
        values = {
            "epoch": done / self.feed.steps_per_epoch,
            "samples_seen": float(seen),
            "learning_rate": learning_rate(self.recipe.train, batch.step),
            "images_per_second": self.images / elapsed,
            "tokens_per_second": self.tokens / elapsed,
            "step_seconds": elapsed / self.steps,
            "data_wait_share": (self.feed.waited - self.waited) / elapsed,
            "memory_gigabytes": self._memory(),
        }
        # Skipped steps have no loss, an unknown device no peak: their metrics are left out, not
        # zero.
        if self.losses:
            values |= {
                "loss": float(np.mean(self.losses)),
                "gradient_norm": float(np.mean(self.norms)),
            }
        if self.flops:
            values["teraflops_per_worker"] = self.flops.useful / elapsed / 1e12
            for name, done_flops in (
                ("mfu", self.flops.useful),
                ("mfu_with_padding", self.flops.computed),
            ):
                if (share := self._mfu(done_flops, elapsed)) is not None:
                    values[name] = share
        self.log({f"train/{name}": value for name, value in values.items()} | self._system(), done)
        self._reset()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send values to tracker and board; every rank keeps the validation loss."""
        self.validation_loss = values.get("validation/loss", self.validation_loss)
        if not self.is_rank_zero:
            return
        if self.tracker:
            self.tracker.metrics(values, step)
        if self.board is not None:
            self.board.post.remote({"step": step, "values": dict(values)})

    def _system(self) -> dict[str, float]:
        """Load of rank 0's node, under the names by which MLflow shows them as system metrics."""
        return self.machine.read() if self.tracker else {}

    def _mfu(self, flops: float, seconds: float) -> float | None:
        return utilisation(flops, seconds, self.engine.device)

    def _memory(self) -> float:
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    def not_finite(self) -> None:
        """Count a step that was not taken because a loss or gradient was not finite."""
        if self.is_rank_zero:
            self.prometheus.not_finite()

    def checkpoint_saved(self) -> None:
        if self.is_rank_zero:
            self.prometheus.checkpoint_saved()

    def close(self) -> None:
        if self.tracker:
            self.tracker.close()
