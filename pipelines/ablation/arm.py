"""One arm of an ablation, trained in one process: the same engine and feed as `train`, measured as
it learns.

Minutes long, so it keeps no checkpoint: an arm is finished when its result is on disk, and starts
over otherwise.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lidit.config import Recipe
from lidit.data.families import Families
from lidit.data.feed import open_feed
from lidit.diffusion import build_objective
from lidit.errors import JobError
from lidit.evals.ablation.results import ArmResult
from lidit.store import Corpus
from pipelines.ablation.eval_set import EvalSet, points_of
from pipelines.training.ema import averaged_model
from pipelines.training.engine import Engine, set_up_device
from pipelines.training.train import initial_model, untrained_model


@dataclass(frozen=True)
class ArmJob:
    """What a worker needs to train one arm. `texts`: encoder -> fingerprint; `latents`: the
    family's fingerprint.
    """

    arm: str
    seed: int
    identity: str
    recipe: Recipe
    texts: dict[str, str]
    latents: str
    eval_set: EvalSet
    points: int

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.recipe.run_folder


def train_arm(job: ArmJob) -> ArmResult:
    """Train and measure an arm; its result is in its folder when this returns.

    Raises JobError where the loss stops being finite.
    """
    recipe, started = job.recipe, time.monotonic()
    device = set_up_device(recipe.engine)
    corpus = Corpus.open(recipe.corpus)
    families = Families.open(corpus, recipe.data, job.latents, job.texts)
    feed = open_feed(corpus, recipe.data, batch_size=recipe.train.batch_size, families=families)
    objective, images = build_objective(recipe.objective), job.eval_set.images()

    model, fresh = initial_model(recipe, families), untrained_model(recipe, families).to("meta")
    parameters = model.num_parameters()
    _process_group_of_one(device)
    engine = Engine(recipe, model, objective, device)

    due, losses, points = set(points_of(recipe, job.points)), [], []
    for batch in feed.batches(0, recipe.train.steps):
        result = engine.train_step(batch.to(device))
        step = batch.step + 1
        if not result.finite:
            raise JobError(
                f"arm {job.arm}, seed {job.seed}: the loss is {result.loss} at step {step}"
            )
        if step % recipe.train.log_every == 0 or step in due:
            losses.append((step, result.loss))
        if step in due:
            averaged = averaged_model(engine.deepspeed, engine.ema, fresh, device)
            assert averaged is not None  # this process is rank 0
            loss = job.eval_set.loss(averaged.to(device), objective, corpus, job.texts)
            points.append(job.eval_set.measure(loss, images, step))

    seconds = time.monotonic() - started
    arm = ArmResult(
        job.identity, job.arm, job.seed, parameters, seconds, tuple(losses), tuple(points)
    )
    arm.save(job.folder)
    return arm


def _process_group_of_one(device: torch.device) -> None:
    """Start a process group for the engine; it stays, because DeepSpeed remembers its groups."""
    if not dist.is_initialized():
        # DeepSpeed reads a launcher's variables
        os.environ.update({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"})
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
