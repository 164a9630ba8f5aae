"""A training as its driver sees it, whatever it trains: resume or refuse, track, run on Ray Train, show, publish."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train as rt
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lidit.config import RunRecipe
from lidit.config.settings import flatten
from lidit.errors import InputError, JobError
from lidit.plots import plot_lines
from lidit.store import Corpus, digest_of, spec_differences
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from pipelines import tracking
from pipelines.runtime.progress import ProgressBar
from pipelines.runtime.resources import check_engine, connect
from pipelines.training import checkpoints, ray_checkpoints
from pipelines.training.interrupt import is_disk_full, saved_on_sigterm
from pipelines.training.metrics import Board

log = logging.getLogger(__name__)
AnyRecipe = TypeVar("AnyRecipe", bound=RunRecipe)
FACTS = "run.json"
UNTRACKED = "untracked"  # there while a model may be published that the tracker was never told of
# Settings that decide where and how fast a run goes, never what it computes.
FREE_ENGINE = {"workers", "min_workers", "cpus_per_worker", "gpus_per_worker", "max_failures", "resources",
               "label_selector", "zero_stage", "offload_optimizer", "offload_parameters", "nvme_path"}  # fmt: skip
# No secrets: Ray writes a worker's environment into its logs and shows it in the dashboard.
# Nothing of the driver's own machine either: it may have no GPU and a single CPU where the workers have both.
WORKER_ENVIRONMENT = ("HF_HUB_OFFLINE", "LIDIT_CACHE", "LIDIT_STORE_CACHE", "LIDIT_STORE_CACHE_GIGABYTES")


@dataclass(frozen=True)
class FitResult:
    """`model`: the folder people load. `trained`: False when everything was there already."""

    model: Path
    step: int
    tracking_uri: str
    run_id: str
    trained: bool


def drive(
    recipe: AnyRecipe,
    corpus: Corpus,
    facts: dict[str, Any],
    tags: dict[str, str],
    allow_drift: bool,
    train: Callable[[AnyRecipe, tracking.Tracker, Path], None],
) -> FitResult:
    """Take the run of this name to its last step, from wherever it stands, and publish its model.

    facts: what the run is made of; a run of the name that was started with others is refused, unless `allow_drift`.
    train: does the steps that are missing, in the run's folder, given the recipe with absolute paths.
    """
    folder = recipe.run_folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe.placed(str(folder.parent), corpus.folder.location)
    check_drift(folder, facts, allow_drift)
    uri = tracking.store_uri(recipe.tracking.uri, folder.parent)
    finished = finished_step(folder)
    if finished is not None and finished >= recipe.train.steps:
        untold = (folder / UNTRACKED).exists()  # killed after publishing
        if untold or (folder / tracking.OUTBOX).exists():
            with _tracked(recipe, corpus, tags, uri, folder) as tracker:  # delivers what an outage left behind
                if untold:
                    track_model(recipe, tracker, folder)
            (folder / UNTRACKED).unlink(missing_ok=True)
        return FitResult(folder / "model", finished, uri, read_run_id(folder), trained=False)
    # Whole or not at all: a run whose facts were torn by a full disk could never go on.
    publish_bytes(Folder.at(folder), FACTS, json.dumps(facts, indent=1, sort_keys=True).encode())
    connect(cpus=math.ceil(recipe.engine.workers * recipe.engine.cpus_per_worker) + 2)
    check_engine(recipe.engine)
    with _tracked(recipe, corpus, tags, uri, folder) as tracker:
        note_run(folder, tracker)
        train(recipe, tracker, folder)
        (folder / UNTRACKED).touch()
        publish_model(folder)
        track_model(recipe, tracker, folder)
    (folder / UNTRACKED).unlink()
    note_run(folder, tracker)  # a tracker that was down at the start may have answered since
    return FitResult(folder / "model", recipe.train.steps, uri, tracker.handle.run_id, trained=True)


@contextmanager
def _tracked(
    recipe: RunRecipe, corpus: Corpus, tags: dict[str, str], uri: str, folder: Path
) -> Iterator[tracking.Tracker]:
    tags = {
        **tags,
        "lidit.corpus_digest": corpus.digest,
        "lidit.ray_job": os.environ.get("RAY_JOB_ID", "embedded"),
    }
    key = digest_of({"name": recipe.name, "output": recipe.output})[:32]
    with tracking.tracked_run(uri, recipe.tracking.experiment, recipe.name, key, flatten(recipe), tags, folder) as run:
        run.dataset(Path(recipe.corpus).name, corpus.digest, recipe.corpus)
        (folder / "recipe.json").write_text(recipe.model_dump_json(indent=1))
        run.artifact(folder / "recipe.json")
        yield run


def check_drift(folder: Path, facts: dict[str, Any], allow_drift: bool) -> None:
    """Refuse to continue a run with other settings or data than it was started with; print what differs."""
    path = folder / FACTS
    if not path.exists():
        return
    differences = spec_differences(json.loads(path.read_text()), facts)
    if differences and not allow_drift:
        listed = "\n  ".join(differences)
        raise InputError(
            f"{folder}: this run was started with other settings or data:\n  {listed}\n"
            "give the run another name (name=...), or continue it all the same with --allow-drift"
        )


def track_model(recipe: RunRecipe, tracker: tracking.Tracker, folder: Path) -> None:
    """The published model as an artifact, its curves, and its place in the registry where the recipe names one."""
    tracker.artifact(folder / "model", "model")
    draw_curves(tracker, folder / "plots")
    if recipe.tracking.registered_model:
        tracker.register(recipe.tracking.registered_model, "model", recipe.tracking.alias)


def draw_curves(tracker: tracking.Tracker, folder: Path) -> None:
    """Loss over steps, and validation loss per noise level, as the tracker has them, written and tracked as PNG."""
    folder.mkdir(exist_ok=True)
    names = {name: name for name in ("loss", "validation/loss")}
    levels = {name: f"t = {name.rpartition('_t')[2]}" for name in tracker.known("validation/loss_t")}
    for file, title, metrics in (("loss.png", "loss", names), ("timesteps.png", "validation loss by timestep", levels)):
        series = {label: tracker.history(name) for name, label in metrics.items()}
        if shown := {label: points for label, points in series.items() if points[0]}:
            plot_lines(folder / file, shown, "loss", title)
            tracker.artifact(folder / file, "plots")


def note_run(folder: Path, tracker: tracking.Tracker) -> None:
    (folder / "mlflow-run").write_text(tracker.handle.run_id)


def finished_step(folder: Path) -> int | None:
    """The step of the exported model; None before there is one."""
    try:
        return int(json.loads((folder / "model" / "finished.json").read_text())["step"])
    except (OSError, ValueError, KeyError):
        return None


def read_run_id(folder: Path) -> str:
    path = folder / "mlflow-run"
    return path.read_text() if path.exists() else ""


def launch(
    worker: Callable[[dict[str, Any]], None],
    recipe: RunRecipe,
    config: dict[str, Any],
    tracker: tracking.Tracker,
    folder: Path,
) -> None:
    """Run `worker` on the recipe's workers to its last step, with progress. `config` is what it gets besides."""
    newest = checkpoints.newest_complete(folder)
    ray_checkpoints.agree(folder, newest)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()  # lives as long as the driver
    ray.get(board.keep.remote(tracking.credentials()))
    engine, gpus = recipe.engine, recipe.engine.gpus_per_worker
    resources = {"CPU": engine.cpus_per_worker, **({"GPU": gpus} if gpus else {}), **engine.resources}
    scaling: dict[str, Any] = {"label_selector": engine.label_selector} if engine.label_selector else {}
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            **config,
            "recipe": recipe.model_dump(mode="json"),
            "tracking": tracker.handle,
            "board": board,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=rt.ScalingConfig(
            num_workers=(engine.min_workers, engine.workers) if engine.min_workers else engine.workers,
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
            worker_runtime_env={"env_vars": {n: os.environ[n] for n in WORKER_ENVIRONMENT if n in os.environ}},
        ),
    )
    start = checkpoints.read_position(newest).step if newest else 0
    with (
        ProgressBar(f"train {recipe.name}", recipe.train.steps, "steps", start=start) as progress,
        _shown(board, progress),
        saved_on_sigterm(board) as stopped,
    ):
        try:
            trainer.fit()
        except rt.TrainingFailedError as error:
            raise ray.get(board.failure.remote()) or _plain(error) from error
        if (failure := ray.get(board.failure.remote())) is not None:
            raise failure
    if stopped.is_set() and checkpoints.read_position(checkpoints.candidates(folder)[0]).step < recipe.train.steps:
        raise KeyboardInterrupt


def _plain(error: BaseException) -> Exception:
    """The mistake or failure below Ray's wrappers, where it is one of ours."""
    text = str(error)
    for kind in (InputError, JobError):
        marker = f"{kind.__module__}.{kind.__name__}: "
        if marker in text:
            return kind(text.rsplit(marker, 1)[1].strip().splitlines()[0])
    if is_disk_full(error):
        return JobError(
            "no space left on the disk; everything finished is kept: make room and run the same command again"
        )
    return JobError(f"training failed: {text.strip().splitlines()[-1] if text.strip() else error!r}")


@contextmanager
def _shown(board: Any, progress: ProgressBar) -> Iterator[None]:
    """Rank 0's messages as progress, read by a thread while the driver waits in fit()."""
    stop = threading.Event()

    def show() -> None:
        while not stop.is_set():
            stop.wait(1.0)
            for message in ray.get(board.take.remote()):
                values = message["values"]
                if "loss" in values:
                    note = f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s"
                    progress.update(message["step"], f"{note}, data wait {values['data_wait_share']:.0%}")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


def publish_model(folder: Path) -> None:
    """Move the exported model out of the last checkpoint; the run is finished when its folder is in place."""
    last = checkpoints.candidates(folder)[0]
    if not (last / "model").is_dir():
        raise JobError(f"{last}: the last checkpoint holds no exported model; delete it and run the same command again")
    target, fresh = folder / "model", folder / "model.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(last / "model", fresh)
    (fresh / "finished.json").write_text(json.dumps({"step": checkpoints.read_position(last).step}))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
