"""What rank 0 tells the world about a training run: metrics, sample grids, progress. Other ranks take part in the
collective work (gathering weights, validation) and stay silent."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lidit.config import Recipe, RunRecipe
from lidit.data.assembler import TrainingBatch
from lidit.data.feed import Feed
from lidit.diffusion import GuidedPredictor, initial_noise, sample, seeded_generators, timestep_losses
from lidit.errors import InputError, JobError
from lidit.models import LIDiT, TextStates
from lidit.plots import labelled_grid
from pipelines.runtime.prometheus import TrainMetrics
from pipelines.tracking import RunHandle, Tracker
from pipelines.training.ema import full_shapes, gather_full
from pipelines.training.engine import Batch, Engine, ShardedEngine, StepResult
from pipelines.training.mfu import step_flops, utilisation
from pipelines.training.schedule import learning_rate


class Board:
    """An actor: messages from rank 0 to the driver, which shows them as progress; credentials the other way."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.kept: dict[str, str] = {}
        self.stopping = False
        self.failed: InputError | JobError | None = None

    def fail(self, error: InputError | JobError) -> None:
        """What no new start of the workers can mend. The first one counts."""
        self.failed = self.failed or error

    def failure(self) -> InputError | JobError | None:
        return self.failed

    def stop(self) -> None:
        """Rank 0 asks after every step: all workers then save and leave."""
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping

    def keep(self, credentials: dict[str, str]) -> None:
        """A call's arguments are in no log, no dashboard and no state export, unlike a worker's environment."""
        self.kept = credentials

    def credentials(self) -> dict[str, str]:
        return self.kept

    def post(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def take(self) -> list[dict[str, Any]]:
        taken, self.messages = self.messages, []
        return taken


class Watch:
    """Speed and losses between two log lines, sent to the tracker, the progress board and Prometheus."""

    def __init__(
        self, recipe: RunRecipe, engine: ShardedEngine[Any], feed: Feed[Any], handle: RunHandle | None, board: Any
    ) -> None:
        self.recipe, self.engine, self.feed = recipe, engine, feed
        self.speaks = engine.rank == 0
        self.tracker = Tracker(handle) if self.speaks and handle else None
        self.board, self.prometheus = board, TrainMetrics(recipe.name)
        self.flops_per_step: float | None = None
        self.validation_loss = math.inf  # the newest one, on every rank: checkpoints are compared by it
        self._reset()

    def _reset(self) -> None:
        self.began, self.waited = time.perf_counter(), self.feed.waited
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.steps = self.images = self.tokens = 0

    def step(self, batch: Batch, result: StepResult, seconds: float, data_wait: float) -> None:
        """Call after every step. Logs every `train.log_every` steps and at the last one."""
        if not self.speaks:
            return
        if result.finite:
            self.losses.append(result.loss)
            self.norms.append(result.gradient_norm)
        self.steps += 1
        self.images += self.engine.recipe.train.batch_size
        self.tokens += batch.tokens * self.engine.world_size
        self.prometheus.step(seconds, data_wait, result.loss, self._mfu(1, seconds))
        done = batch.step + 1
        if done % self.recipe.train.log_every and done != self.recipe.train.steps:
            return
        elapsed = time.perf_counter() - self.began
        values = {
            "learning_rate": learning_rate(self.recipe.train, batch.step),
            "images_per_second": self.images / elapsed,
            "tokens_per_second": self.tokens / elapsed,
            "step_seconds": elapsed / self.steps,
            "data_wait_share": (self.feed.waited - self.waited) / elapsed,
            "memory_gigabytes": self._memory(),
        }
        if self.losses:
            values |= {"loss": float(np.mean(self.losses)), "gradient_norm": float(np.mean(self.norms))}
        if self.flops_per_step:
            values["teraflops_per_worker"] = self.flops_per_step * self.steps / elapsed / 1e12
        if (mfu := self._mfu(self.steps, elapsed)) is not None:
            values["mfu"] = mfu
        self.metrics(values, done)
        self._reset()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.validation_loss = values.get("validation/loss", self.validation_loss)
        if not self.speaks:
            return
        if self.tracker:
            self.tracker.metrics(values, step)
        if self.board is not None:
            self.board.post.remote({"step": step, "values": dict(values)})

    def _mfu(self, steps: int, seconds: float) -> float | None:
        if self.flops_per_step is None:
            return None
        return utilisation(self.flops_per_step * steps, seconds, self.engine.device)

    def _memory(self) -> float:
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    def count_flops(self, batch: Batch) -> None:
        """FLOPs of one step on this worker, counted on the forward pass of one sample."""
        if self.recipe.engine.zero_stage == 3 or not self.speaks:  # a lone forward would wait for the other ranks
            return
        one = batch.split(len(batch.keys))[0]
        self.flops_per_step = step_flops(lambda: self.engine.forward(one), len(batch.keys))

    def not_finite(self) -> None:
        """Call for a step that is not taken, for its loss is not finite on some worker."""
        if self.speaks:
            self.prometheus.not_finite()

    def checkpoint_saved(self) -> None:
        if self.speaks:
            self.prometheus.checkpoint_saved()

    def close(self) -> None:
        if self.tracker:
            self.tracker.close()


AnyModel = TypeVar("AnyModel", bound=nn.Module)


def averaged_model(engine: ShardedEngine[Any], fresh: AnyModel | None) -> AnyModel | None:
    """The EMA weights in `fresh` (rank 0's copy, built once), on the worker's device. Collective; None elsewhere."""
    full = gather_full(full_shapes(engine.deepspeed), engine.ema.fragments, engine.ema.average, engine.device)
    if full is None or fresh is None:
        return None
    buffers = dict(engine.deepspeed.module.named_buffers())
    missing, unexpected = fresh.load_state_dict({**full, **buffers}, strict=False)
    if unexpected or set(missing) - set(fresh.state_dict()) or any(name in full for name in missing):
        raise RuntimeError(f"the averaged weights do not fit the model: {missing} {unexpected}")
    return fresh.to(engine.device).eval()


@torch.no_grad()
def draw_prompts(
    engine: Engine,
    model: LIDiT,
    recipe: Recipe,
    prompts: Mapping[str, list[torch.Tensor]],
    empty: Mapping[str, torch.Tensor],
    prefixes: Mapping[str, torch.Tensor],
    shape: tuple[int, int, int],
    codec: Any,
    path: Path,
) -> None:
    """Images of the recipe's fixed prompts, always from the same noise, as a labelled grid at `path`."""
    text = {n: TextStates.collate(rows, prefixes[n]).to(engine.device) for n, rows in prompts.items()}
    nothing = {n: TextStates.collate([empty[n]], prefixes[n]).to(engine.device) for n in prompts}
    count = len(recipe.train.sample_prompts)
    noise = initial_noise(seeded_generators(range(count)), shape, engine.device)
    latents = sample(GuidedPredictor(model, text, nothing, recipe.sampler), engine.objective, noise, recipe.sampler)
    images = codec.decode(latents).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    labelled_grid(list(images), list(recipe.train.sample_prompts)).save(path)


@torch.no_grad()
def validation_loss(
    engine: Engine, batches: list[TrainingBatch], first: int, seed: int, levels: int = 8
) -> dict[str, float]:
    """Loss per timestep on fixed noise, mean over the held-out batches of all workers. Collective.

    first: place of this worker's first sample in a global batch; a sample's noise goes by its place.
    """
    total, count = torch.zeros(levels, device=engine.device), torch.zeros((), device=engine.device)
    engine.deepspeed.eval()
    for number, batch in enumerate(batches):
        moved = batch.to(engine.device)
        seeds = [seed + 1_000_003 * number + first + i for i in range(len(batch.keys))]
        predict = lambda x_t, t, text=moved.text: engine.deepspeed(x_t.to(engine.compute_dtype), t, text)  # noqa: E731
        losses = timestep_losses(predict, engine.objective, moved.latents, seeds, levels)  # [B, K]
        total, count = total + losses.sum(0), count + len(losses)
    engine.deepspeed.train()
    dist.all_reduce(total)
    dist.all_reduce(count)
    means = (total / count).tolist()
    return {"validation/loss": math.fsum(means) / levels} | {
        f"validation/loss_t{(i + 0.5) / levels:.3f}": value for i, value in enumerate(means)
    }
