"""What every training worker does, whatever it trains: where it runs, restore, step, save."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
import ray.train as rt
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode
from torch import nn

from lidit.config import RunRecipe
from lidit.data.feed import Feed
from lidit.errors import InputError, JobError
from pipelines.training import checkpoints
from pipelines.training.engine import AnyBatch, ShardedEngine, StepResult, worker_device
from pipelines.training.interrupt import Listener, Wish, is_disk_full
from pipelines.training.metrics import Watch, averaged_model
from pipelines.training.ray_checkpoints import WORST

AnyModel = TypeVar("AnyModel", bound=nn.Module)


def attempt(body: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
    """One start of a worker. Ray starts workers again after any error; after one of ours that is no use.

    The driver's board hears of such an error, and later starts end at once.
    """
    board = config["board"]
    if ray.get(board.failure.remote()) is not None:
        return
    try:
        body(config)
    except (InputError, JobError) as error:
        ray.get(board.fail.remote(error))
        raise


class TrainingLoop(ABC, Generic[AnyBatch, AnyModel]):
    """One worker's engine, feed and position.

    config: Ray Train's, with `facts`, the tracking handle, the progress board and the prompts' states.
    """

    engine: ShardedEngine[AnyBatch]
    feed: Feed[AnyBatch]
    fresh: AnyModel | None  # rank 0's copy of the model, for averaged weights

    def __init__(self, config: dict[str, Any], recipe: RunRecipe) -> None:
        self.config, self.run = config, recipe
        context = rt.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = worker_device(recipe.engine)
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, int(recipe.engine.cpus_per_worker)))

    def begin(self, engine: ShardedEngine[AnyBatch], feed: Feed[AnyBatch], fresh: AnyModel | None) -> None:
        """Take the engine and go to where the run stands."""
        self.engine, self.feed, self.fresh = engine, feed, fresh
        if self.config["board"] is not None:
            os.environ.update(ray.get(self.config["board"].credentials.remote()))
        self.watch = Watch(self.run, engine, feed, self.config["tracking"], self.config["board"])
        # Before any worker can save: what a killed one was about to send would stay on this machine's disk for ever.
        for left in Path(tempfile.gettempdir()).glob(f"{checkpoints.unsent_prefix(self.run.run_folder)}*"):
            shutil.rmtree(left, ignore_errors=True)
        self.step, self.waited = self._restore(), 0.0
        self.saved, self.listener = self.step, Listener(self.config["board"], self.device)

    def batches(self) -> Iterator[AnyBatch]:
        """This worker's part of every batch that is left; ends early, with everything saved, when it is asked to."""
        for batch in self.feed.batches(self.step, self.run.train.steps):
            yield batch
            wish = self.listener.ask()
            if wish is not Wish.GO_ON and self.saved != self.step:
                self.save()
            if wish is Wish.STOP:
                return

    def _restore(self) -> int:
        """The step to go on with: after the newest whole checkpoint, the same one on every rank."""
        agreed: list[tuple[Path | None, str]] = [(None, "")]
        if self.rank == 0:
            agreed = [(checkpoints.newest_complete(self.run.run_folder), uuid.uuid4().hex)]
        dist.broadcast_object_list(agreed)
        newest, self.start = agreed[0]  # `start` names these workers: parts that two starts wrote are no checkpoint
        if newest is None:
            return 0
        return checkpoints.CheckpointReader(newest).restore(self.engine.deepspeed, self.engine.ema).step

    def take_step(self, batch: AnyBatch) -> None:
        began = time.perf_counter()
        moved = batch.to(self.device)
        if self.watch.flops_per_step is None:
            self.watch.count_flops(moved)
        result = self.engine.train_step(moved)
        if not result.finite:
            self._not_finite(batch, result)
        self.step = batch.step + 1
        wait, self.waited = self.feed.waited - self.waited, self.feed.waited
        self.watch.step(batch, result, time.perf_counter() - began + wait, wait)

    def _not_finite(self, batch: AnyBatch, result: StepResult) -> None:
        """This worker's own loss may be sound. Stopping, all workers save what they have."""
        self.watch.not_finite()
        path = self.run.run_folder / f"not-finite-{batch.step:09}-rank{self.rank}.json"
        loss, norm = result.loss, result.gradient_norm
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
        if bad := not math.isfinite(loss) or math.isinf(norm):
            path.write_text(json.dumps({"step": batch.step, "what": what, "keys": list(batch.keys)}, indent=1))
        if self.run.train.non_finite == "skip":
            return
        if self.saved != self.step:
            self.save()
        if bad:
            raise JobError(f"step {batch.step}: the {what}; the batch's keys are in {path}")
        raise RuntimeError(f"step {batch.step}: the loss is not finite on another worker")

    def due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.run.train.steps)

    def save_if_due(self) -> None:
        if self.due(self.run.train.checkpoint_every):
            self.save()

    def save(self) -> None:
        """Report a checkpoint of this step; collective. JobError where the disk is full."""
        try:
            self._save()
        except Exception as error:
            if not is_disk_full(error):
                raise
            where = self.run.run_folder / checkpoints.checkpoint_name(self.step)
            shutil.rmtree(where, ignore_errors=True)  # what is there of it would only take more room
            raise JobError(
                f"{where}: no space left on the disk for this checkpoint; everything before it is kept: make room and "
                "run the same command again"
            ) from None
        self.saved = self.step

    def _save(self) -> None:
        last = self.step == self.run.train.steps
        position = checkpoints.Position(
            self.step, self.world_size, self.engine.ema.updates, self.config["facts"], self.start
        )
        folder = Path(tempfile.mkdtemp(prefix=checkpoints.unsent_prefix(self.run.run_folder)))
        behind = False  # else Ray deletes the folder after the upload
        try:
            model = averaged_model(self.engine, self.fresh) if last else None
            if model is not None:
                self.export(folder / checkpoints.MODEL, model)
            checkpoints.save(folder, self.engine.deepspeed, self.engine.ema, self.rank, position)
            behind, loss = self.run.train.async_upload and not last, self.watch.validation_loss
            rt.report(
                {"step": self.step, "validation_loss": loss if math.isfinite(loss) else WORST},
                checkpoint=rt.Checkpoint.from_directory(str(folder)),
                checkpoint_dir_name=checkpoints.checkpoint_name(self.step),
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC if behind else CheckpointUploadMode.SYNC,
            )
        finally:
            if not behind:
                shutil.rmtree(folder, ignore_errors=True)
        self.watch.checkpoint_saved()

    @abstractmethod
    def export(self, folder: Path, model: AnyModel) -> None:
        """Write the folder people load from the averaged model; called on rank 0 after the last step."""
