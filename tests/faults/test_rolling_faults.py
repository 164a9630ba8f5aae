"""`lidit run` with states computed beside training: whatever dies, the losses are an undisturbed
offline run's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from lidit.config import Recipe
from lidit.store import Corpus
from pipelines.training import checkpoints
from pipelines.training.driver import TrainResult
from pipelines.training.train import train
from tests.helpers.trained import SmallWorld
from tests.helpers.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FINAL = "model/diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).parents[2]
STEPS = 16  # two epochs of five units
START = 1200  # seconds: two Rays on a busy machine take minutes to start their workers


@pytest.fixture(scope="module")
def undisturbed(
    small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, TrainResult]:
    """From whole families."""
    recipe = small_world.recipe(
        tmp_path_factory.mktemp("undisturbed"),
        train={
            "steps": STEPS,
            "log_every": 1,
            "checkpoint_every": 3,
            "validate_every": 8,
            "validation_samples": 12,
        },
        data={"window_units": 1, "validation_fraction": 0.2},
    )
    return recipe, train(recipe)


@pytest.fixture
def online(undisturbed: tuple[Recipe, TrainResult], tmp_path: Path) -> Recipe:
    """The same training with nothing but captions, pictures and latents on disk."""
    recipe, _ = undisturbed
    corpus = tmp_path / "corpus"
    shutil.copytree(recipe.corpus, corpus, ignore=shutil.ignore_patterns("text"))
    tree = recipe.model_dump(mode="json") | {
        "corpus": str(corpus),
        "output": str(tmp_path / "runs"),
        "online": {"ahead": 1, "budget": 4, "patience": 120},
    }
    return Recipe.model_validate(tree)


def losses(uri: str, run_id: str, metric: str = "loss") -> list[float]:
    points = MlflowClient(uri).get_metric_history(run_id, metric)
    return [point.value for point in sorted(points, key=lambda point: point.step)]


def same_as(recipe: Recipe, result: TrainResult) -> None:
    """Losses, validation losses and weights, to the last bit."""
    uri = f"sqlite:///{recipe.output}/mlflow.db"
    run_id = (recipe.run_folder / "mlflow-run").read_text()
    for metric in ("loss", "validation/loss"):
        assert losses(uri, run_id, metric) == losses(result.tracking_uri, result.run_id, metric)
    straight, again = (
        load_file(result.model / FINAL),
        load_file(recipe.run_folder / "model" / FINAL),
    )
    assert all(torch.equal(value, again[name]) for name, value in straight.items())
    for handle in Corpus.open(recipe.corpus).text_families():
        assert handle.rolling
        left = sorted((Path(recipe.corpus) / "text" / handle.directory).glob("[0-9]*.arrow"))
        assert len(left) <= 4 + 5, "more units than the budget and those of the validation"


def written(recipe: Recipe, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return str(path)


@contextmanager
def command(
    recipe: Recipe, folder: Path, *words: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """`lidit run`, or a job of these words, as a process of its own, with an embedded Ray of its
    own.
    """
    words = words or ("run", written(recipe, folder), "--until", "train")
    process = subprocess.Popen(
        [sys.executable, "-m", f"jobs.{words[0]}", *words[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(recipe: Recipe, folder: Path) -> str:
    with command(recipe, folder) as process:
        output = process.communicate(timeout=900)[0]
        assert process.returncode == 0, output[-6000:]
    return output


def ended(process: subprocess.Popen[str]) -> Callable[[], str | None]:
    return lambda: None if process.poll() is None else process.communicate()[0][-6000:]


def processes(parent: int, name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def saved(recipe: Recipe, step: int) -> Path:
    return recipe.run_folder / checkpoints.checkpoint_name(step) / "position.json"


def records(recipe: Recipe) -> list[Path]:
    return list(Path(recipe.corpus).glob("text/*/[0-9]*.json"))


def test_undisturbed_it_computes_what_offline_does(
    undisturbed: tuple[Recipe, TrainResult], online: Recipe, tmp_path: Path
) -> None:
    said = finish(online, tmp_path)
    assert said.count("rolling, ") == 2
    same_as(online, undisturbed[1])
    finish(online, tmp_path)  # and again it does nothing
    same_as(online, undisturbed[1])


def test_both_sides_may_be_started_apart(
    undisturbed: tuple[Recipe, TrainResult], online: Recipe, tmp_path: Path
) -> None:
    path = written(online, tmp_path)
    with command(online, tmp_path, "embed", online.corpus, "--rolling", path) as encoders:
        wait_until(lambda: len(records(online)) >= 2, START, ended(encoders))
        with command(online, tmp_path, "train", path) as training:
            output = training.communicate(timeout=900)[0]
            assert training.returncode == 0, output[-6000:]
        said = encoders.communicate(timeout=120)[0]  # ends by itself when training has
        assert encoders.returncode == 0, said[-6000:]
    same_as(online, undisturbed[1])


@pytest.mark.parametrize("step", [0, 6])
def test_the_driver_is_killed(
    step: int, undisturbed: tuple[Recipe, TrainResult], online: Recipe, tmp_path: Path
) -> None:
    """Before the first step, and in the middle: the janitor and both schedulers die with it."""
    with command(online, tmp_path) as process:
        wait_until(
            lambda: saved(online, step).exists() if step else records(online), START, ended(process)
        )
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (online.run_folder / "model").exists()
    finish(online, tmp_path)
    same_as(online, undisturbed[1])


@pytest.mark.parametrize("name", ["RayTrainWorker", "RollingEncoder"])
def test_a_trainer_or_an_encoder_is_killed(
    name: str, undisturbed: tuple[Recipe, TrainResult], online: Recipe, tmp_path: Path
) -> None:
    with command(online, tmp_path) as process:
        wait_until(saved(online, 3).exists, START, ended(process))
        victim = wait_until(lambda: processes(process.pid, name), 60, ended(process))[0]
        victim.kill()
        output = process.communicate(timeout=900)[0]
        assert process.returncode == 0, output[-6000:]
    same_as(online, undisturbed[1])


@pytest.mark.parametrize(
    "point",
    [
        "rolling-announced",
        "record-kept",
        "record-deleted:2",
        "data-deleted:3",
        "data-renamed:3",
        "record-written:2",
    ],
)
def test_a_kill_at_a_point_of_the_protocol(
    point: str, undisturbed: tuple[Recipe, TrainResult], online: Recipe, tmp_path: Path
) -> None:
    """Of the janitor, which is the driver, or of every encoder again and again."""
    with command(online, tmp_path, LIDIT_CRASH_AT=point) as process:
        process.communicate(timeout=900)
        if "renamed" not in point and "written" not in point:
            assert process.returncode == -signal.SIGKILL
    finish(online, tmp_path)
    same_as(online, undisturbed[1])
