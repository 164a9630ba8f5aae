"""A training run as its driver sees it: resume or refuse, track, run on Ray Train, publish."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray
import ray.train as rt
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lidit.config import RunRecipe
from lidit.errors import JobError
from lidit.store import Corpus
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from lidit.store.files.owner import owned
from pipelines import tracking
from pipelines.runtime.progress import ProgressBar
from pipelines.runtime.resources import check_engine, connect
from pipelines.training import checkpoints, ray_checkpoints
from pipelines.training.board import Board
from pipelines.training.drift import FACTS, check_drift
from pipelines.training.interrupt import is_disk_full, saved_on_sigterm
from pipelines.training.loop import TrainWorker
from pipelines.training.record import track_model, tracked_training

log = logging.getLogger(__name__)
AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)
UNTRACKED = "untracked"  # a file beside the model until the tracker has the model
# No secrets: Ray writes a worker's environment into its logs and shows it in the dashboard. Nothing
# of the driver's own machine either: it may have no GPU and a single CPU where the workers have
# both.
WORKER_ENVIRONMENT = (
    "HF_HUB_OFFLINE",
    "LIDIT_CACHE",
    "LIDIT_STORE_CACHE",
    "LIDIT_STORE_CACHE_GIGABYTES",
)


@dataclass(frozen=True)
class TrainResult:
    """`model`: the folder people load. `trained`: False if the run was finished before."""

    model: Path
    step: int
    tracking_uri: str
    run_id: str
    trained: bool


@contextmanager
def open_run(
    recipe: AnyRecipe,
    corpus: Corpus,
    facts: dict[str, Any],
    tags: dict[str, str],
    allow_drift: bool,
) -> Iterator[Run[AnyRecipe]]:
    """The run of the recipe's name: not drifted, connected to Ray, tracked while the block runs.

    facts: what the run is made of. Raises InputError where the run was started with other facts,
    unless `allow_drift`. A finished run starts no Ray; it only delivers to the tracker what an
    outage or a kill left behind.
    """
    folder = recipe.run_folder.resolve()
    recipe = recipe.placed(str(folder.parent), corpus.folder.location)
    check_drift(folder, facts, allow_drift)
    run = Run(recipe, folder, tracking.store_uri(recipe.tracking.uri, folder.parent))

    if run.finished:
        untracked = (folder / UNTRACKED).exists()  # killed between publishing and tracking
        if untracked or (folder / tracking.OUTBOX).exists():
            with (
                owned(folder, "trained"),
                tracked_training(run.recipe, run.folder, run.tracking_uri, corpus, tags) as tracker,
            ):
                if untracked:
                    track_model(recipe, tracker, folder, run.recipe.train.steps)
            (folder / UNTRACKED).unlink(missing_ok=True)
        yield run
        return

    # Two trainings in one folder would remove each other's checkpoints.
    with owned(folder, "trained"):
        connect(cpus=math.ceil(recipe.engine.workers * recipe.engine.cpus_per_worker) + 2)
        check_engine(recipe.engine)
        with tracked_training(
            run.recipe, run.folder, run.tracking_uri, corpus, tags
        ) as run.tracker:
            # Whole or not at all, and by a run that can start: a run whose facts were torn by a
            # full disk could never go on, and a refused start must not bind the next one.
            facts_bytes = json.dumps(facts, indent=1, sort_keys=True).encode()
            publish_bytes(Folder.at(folder), FACTS, facts_bytes)
            note_run(folder, run.tracker)
            yield run
        (folder / UNTRACKED).unlink(missing_ok=True)
        # a tracker that was down at the start may have answered since
        note_run(folder, run.tracker)


class Run(Generic[AnyRecipe]):
    """One training run, opened by `open_run`. `recipe` has absolute paths."""

    tracker: tracking.Tracker  # of a run that was not finished when it was opened

    def __init__(self, recipe: AnyRecipe, folder: Path, tracking_uri: str) -> None:
        self.recipe, self.folder, self.tracking_uri = recipe, folder, tracking_uri
        self.trained = False  # by this call

    @property
    def finished(self) -> bool:
        """Whether the model of the recipe's last step is published."""
        step = finished_step(self.folder)
        return step is not None and step >= self.recipe.train.steps

    @property
    def result(self) -> TrainResult:
        step = finished_step(self.folder) or 0
        return TrainResult(
            self.folder / "model",
            step,
            self.tracking_uri,
            tracking.read_run_id(self.folder),
            self.trained,
        )

    def launch(self, worker: TrainWorker, config: dict[str, Any]) -> None:
        """Run `worker` on the recipe's workers until the last step, with progress.

        config: what the worker gets besides recipe, tracking handle and board. Raises a worker's
        InputError or JobError, JobError where Ray gives up, KeyboardInterrupt after SIGTERM with
        everything saved.
        """
        # Where the workers will go on; Ray refuses to start while its own list says otherwise.
        newest = checkpoints.newest_complete(self.folder)
        ray_checkpoints.agree(self.folder, newest)
        start = checkpoints.read_position(newest).step if newest else 0

        board = _start_board()
        config = {
            **config,
            "recipe": self.recipe.model_dump(mode="json"),
            "tracking": self.tracker.handle,
            "board": board,
        }
        trainer, steps = _trainer(worker, config, self.recipe), self.recipe.train.steps
        with (
            ProgressBar(f"train {self.recipe.name}", steps, "steps", start=start) as progress,
            _shown(board, progress),
            saved_on_sigterm(board) as stopped,
        ):
            try:
                trainer.fit()
            except rt.TrainingFailedError as error:
                raise ray.get(board.failure.remote()) or _job_error(error) from error
            # Workers that restart after a recorded failure exit at once, and to Ray that is
            # success.
            if (failure := ray.get(board.failure.remote())) is not None:
                raise failure

        # The workers saved and left, which is no success unless it was the last step.
        if (
            stopped.is_set()
            and checkpoints.read_position(checkpoints.candidates(self.folder)[0]).step < steps
        ):
            raise KeyboardInterrupt

    def publish_model(self) -> None:
        """Put the last checkpoint's model in its place and track it: the run is finished."""
        (self.folder / UNTRACKED).touch()
        publish_model(self.folder)
        self.trained = True
        track_model(self.recipe, self.tracker, self.folder, self.recipe.train.steps)


# -- a run's folder and its tracker ----------------------------------------------------------------


def note_run(folder: Path, tracker: tracking.Tracker) -> None:
    """Keep the tracker's run id in the run's folder."""
    (folder / tracking.RUN_FILE).write_text(tracker.handle.run_id)


def finished_step(folder: Path) -> int | None:
    """The step of the exported model; None before there is one."""
    try:
        return int(json.loads((folder / "model" / "finished.json").read_text())["step"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def publish_model(folder: Path) -> None:
    """Copy the last checkpoint's model; the run is finished when the folder is in place."""
    last = checkpoints.candidates(folder)[0]
    if not (last / "model").is_dir():
        raise JobError(
            f"{last}: the last checkpoint holds no exported model; delete it and run the "
            "same command again"
        )
    target, fresh = folder / "model", folder / "model.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(last / "model", fresh)
    (fresh / "finished.json").write_text(json.dumps({"step": checkpoints.read_position(last).step}))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


# -- Ray Train ------------------------------------------------------------------------------------


def _start_board() -> Any:
    """The board's actor, on the driver's node so that it lives as long as the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    ray.get(board.keep.remote(tracking.credentials()))
    return board


def _trainer(worker: TrainWorker, config: dict[str, Any], recipe: RunRecipe) -> TorchTrainer:
    """Ray Train's trainer for the recipe's workers, restarts and checkpoints."""
    engine, gpus = recipe.engine, recipe.engine.gpus_per_worker
    resources = {
        "CPU": engine.cpus_per_worker,
        **({"GPU": gpus} if gpus else {}),
        **engine.resources,
    }
    scaling: dict[str, Any] = (
        {"label_selector": engine.label_selector} if engine.label_selector else {}
    )
    return TorchTrainer(
        worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=rt.ScalingConfig(
            num_workers=(engine.min_workers, engine.workers)
            if engine.min_workers
            else engine.workers,
            use_gpu=bool(gpus),
            resources_per_worker=resources,
            **scaling,
        ),
        run_config=rt.RunConfig(
            name=recipe.name,
            storage_path=recipe.output,
            failure_config=rt.FailureConfig(max_failures=engine.max_failures),
            checkpoint_config=rt.CheckpointConfig(
                num_to_keep=recipe.train.keep_checkpoints,
                checkpoint_score_attribute="validation_loss" if recipe.train.keep_best else None,
                checkpoint_score_order="min",
            ),
            worker_runtime_env={
                "env_vars": {n: os.environ[n] for n in WORKER_ENVIRONMENT if n in os.environ}
            },
        ),
    )


def _job_error(error: BaseException) -> JobError:
    """Why Ray gave up, where no worker recorded an error of ours."""
    if is_disk_full(error):
        return JobError(
            "no space left on the disk; everything finished is kept: make room and run the same "
            "command again"
        )
    text = str(error).strip()
    return JobError(f"training failed: {text.splitlines()[-1] if text else repr(error)}")


@contextmanager
def _shown(board: Any, progress: ProgressBar) -> Iterator[None]:
    """Show rank 0's messages as progress, read by a thread while the driver waits in `fit()`."""
    stop = threading.Event()

    def show() -> None:
        while not stop.is_set():
            stop.wait(1.0)
            for message in ray.get(board.take.remote()):
                values = message["values"]
                if "train/loss" in values:
                    note = (
                        f"loss {values['train/loss']:.4f}, "
                        f"{values['train/images_per_second']:.0f} images/s"
                    )
                    progress.update(
                        message["step"], f"{note}, data wait {values['train/data_wait_share']:.0%}"
                    )

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
