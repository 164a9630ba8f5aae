"""What every training worker does, whatever it trains: restore, step, save.

A training (train.py, train_codec.py) builds model, engine and feed, and hands them to its
`TrainingLoop`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import tempfile
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic

import ray
import ray.train as rt
import torch.distributed as dist
from ray.train import CheckpointUploadMode

from lidit.config import RunRecipe
from lidit.data.feed import Batches
from lidit.errors import InputError, JobError, one_line
from pipelines.training import checkpoints
from pipelines.training.ema import AnyModel, averaged_model, without_trained_numbers
from pipelines.training.engine import AnyBatch, ShardedEngine, StepResult
from pipelines.training.interrupt import Action, Listener, is_disk_full
from pipelines.training.metrics import TrainingMetrics
from pipelines.training.ray_checkpoints import WORST

TrainWorker = Callable[[dict[str, Any]], None]
# Mistakes in code, a reward function's for one: the same on every machine and at every start.
MISTAKES = (TypeError, AttributeError, NameError, ImportError, NotImplementedError)


def reports_failure(worker: TrainWorker) -> TrainWorker:
    """Run one worker. Ray restarts workers after any error; some errors would only come again.

    An InputError, a JobError or a mistake in code is recorded on the driver's board
    (`config["board"]`), so that restarts exit at once.
    """

    @functools.wraps(worker)
    def reporting(config: dict[str, Any]) -> None:
        board = config["board"]
        if ray.get(board.failure.remote()) is not None:
            return
        try:
            worker(config)
        except (InputError, JobError) as error:
            ray.get(board.fail.remote(error))
            raise
        except MISTAKES as error:
            ray.get(board.fail.remote(_mistake(error)))
            raise

    return reporting


def _mistake(error: Exception) -> JobError:
    """What and where, in a line; Ray prints the whole traceback with the worker's output."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return JobError(
        f"{frame.filename}, line {frame.lineno}: {type(error).__name__}: {one_line(error, 300)}; "
        "everything saved is kept: mend the code and run the same command again"
    )


class TrainingLoop(ABC, Generic[AnyBatch, AnyModel]):
    """One worker's engine, feed and position.

    config: Ray Train's, with `facts`, the tracking handle and the progress board.
    fresh: rank 0's copy of the model, for averaged weights; its numbers are not kept.
    """

    engine: ShardedEngine[AnyBatch]
    recipe: RunRecipe

    def __init__(
        self,
        config: dict[str, Any],
        engine: ShardedEngine[AnyBatch],
        feed: Batches[AnyBatch],
        fresh: AnyModel | None,
    ) -> None:
        self.config, self.engine, self.feed = config, engine, feed
        self.fresh = fresh if fresh is None else without_trained_numbers(fresh)
        self.recipe, self.device = engine.recipe, engine.device
        self.rank, self.world_size = engine.rank, engine.world_size
        # Rank 0 logs to the tracker with the driver's credentials, which no worker's environment
        # carries.
        os.environ.update(ray.get(config["board"].credentials.remote()))
        self.metrics = TrainingMetrics(
            self.recipe, engine, feed, config["tracking"], config["board"]
        )
        # Before any worker can save: what a killed one was about to send would stay on this
        # machine's disk for ever.
        for left in Path(tempfile.gettempdir()).glob(
            f"{checkpoints.unsent_prefix(self.recipe.run_folder)}*"
        ):
            shutil.rmtree(left, ignore_errors=True)
        self.step, self.waited = self._restore(), 0.0
        self.saved, self.listener = self.step, Listener(config["board"])
        self.wish = Action.GO_ON

    def batches(self) -> Iterator[AnyBatch]:
        """This worker's part of every remaining batch; ends early, all saved, if the
        driver asks.
        """
        for batch in self.feed.batches(self.step, self.recipe.train.steps, self.device):
            yield batch
            action, self.wish = self.listener.answer(self.wish), Action.GO_ON
            if action is not Action.GO_ON and self.saved != self.step:
                self.save()
            if action is Action.STOP:
                return

    def _restore(self) -> int:
        """Load the newest whole checkpoint, the same one on every rank; the step to go on with."""
        agreed: list[tuple[Path | None, str]] = [(None, "")]
        if self.rank == 0:
            agreed = [(checkpoints.newest_complete(self.recipe.run_folder), uuid.uuid4().hex)]
        dist.broadcast_object_list(agreed)
        # `start` names these workers: parts that two starts wrote are no checkpoint
        newest, self.start = agreed[0]
        if newest is None:
            return 0
        return (
            checkpoints.CheckpointReader(newest)
            .restore(self.engine.deepspeed, self.engine.ema)
            .step
        )

    def take_step(self, batch: AnyBatch) -> None:
        """One optimizer step on this worker's part of a global batch."""
        began = time.perf_counter()
        moved = batch.to(self.device)
        result = self.engine.train_step(moved, self.listener.wish)
        self.wish = Action(result.wish)
        if not result.finite:
            self._not_finite(batch, result)
        self.step = batch.step + 1
        wait, self.waited = self.feed.waited - self.waited, self.feed.waited
        self.metrics.step(moved, result, time.perf_counter() - began + wait, wait)

    def _not_finite(self, batch: AnyBatch, result: StepResult) -> None:
        """Record a batch whose loss is bad; unless such steps are skipped, save and stop."""
        self.metrics.not_finite()
        path = self.recipe.run_folder / f"not-finite-{batch.step:09}-rank{self.rank}.json"
        loss, norm = result.loss, result.gradient_norm
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
        if bad := not math.isfinite(loss) or math.isinf(norm):
            path.write_text(
                json.dumps({"step": batch.step, "what": what, "keys": list(batch.keys)}, indent=1)
            )
        if self.recipe.train.non_finite == "skip":
            return
        if self.saved != self.step:
            self.save()
        if bad:
            raise JobError(f"step {batch.step}: the {what}; the batch's keys are in {path}")
        raise RuntimeError(f"step {batch.step}: the loss is not finite on another worker")

    def due(self, every: int) -> bool:
        """Whether this step is one of every so many, or the last; 0 means never."""
        return bool(every) and (self.step % every == 0 or self.step == self.recipe.train.steps)

    def save_if_due(self) -> None:
        if self.due(self.recipe.train.checkpoint_every):
            self.save()

    def save(self) -> None:
        """Report a checkpoint of this step; collective. JobError where the disk is full."""
        try:
            self._save()
        except Exception as error:
            if not is_disk_full(error):
                raise
            where = self.recipe.run_folder / checkpoints.checkpoint_name(self.step)
            # half a checkpoint is of no use and takes room
            shutil.rmtree(where, ignore_errors=True)
            raise JobError(
                f"{where}: no space left on the disk for this checkpoint; everything before it "
                "is kept: make room and "
                "run the same command again"
            ) from None
        self.saved = self.step

    def _save(self) -> None:
        last = self.step == self.recipe.train.steps
        position = checkpoints.Position(
            self.step, self.world_size, self.engine.ema.updates, self.config["facts"], self.start
        )
        folder = Path(tempfile.mkdtemp(prefix=checkpoints.unsent_prefix(self.recipe.run_folder)))
        behind = False  # whether Ray uploads in the background, and deletes the folder afterwards
        try:
            model = self.averaged() if last else None
            if model is not None:
                self.export(folder / checkpoints.MODEL, model)
            checkpoints.save(folder, self.engine.deepspeed, self.engine.ema, self.rank, position)
            behind, loss = self.recipe.train.async_upload and not last, self.metrics.validation_loss
            rt.report(
                {"step": self.step, "validation_loss": loss if math.isfinite(loss) else WORST},
                checkpoint=rt.Checkpoint.from_directory(str(folder)),
                checkpoint_dir_name=checkpoints.checkpoint_name(self.step),
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC
                if behind
                else CheckpointUploadMode.SYNC,
                checkpoint_upload_fn=self._sender(),
            )
        finally:
            if not behind:
                shutil.rmtree(folder, ignore_errors=True)
        self.metrics.checkpoint_saved()

    def _sender(self) -> Callable[[rt.Checkpoint, str], rt.Checkpoint]:
        """Ray's own copying, the record of this rank's part last."""
        storage, rank = rt.get_context().get_storage(), self.rank

        def send(part: rt.Checkpoint, name: str) -> rt.Checkpoint:
            def persist(folder: Path) -> rt.Checkpoint:
                return storage.persist_current_checkpoint(
                    rt.Checkpoint.from_directory(str(folder)), name
                )

            return checkpoints.send(Path(part.path), rank, persist)

        return send

    def averaged(self) -> AnyModel | None:
        """A model with averaged weights in float32 on rank 0's CPU, None elsewhere. Collective."""
        return averaged_model(self.engine.deepspeed, self.engine.ema, self.fresh, self.device)

    @abstractmethod
    def export(self, folder: Path, model: AnyModel) -> None:
        """Write the folder people load from the averaged model; called on rank 0 after the last
        step.
        """
