"""Whatever ends a training early (a killed driver, SIGTERM, a full disk, half a checkpoint, fewer
machines): the same command finishes it, and on as many workers it ends with the same bits as an
undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from lidit.config import Recipe
from lidit.errors import InputError
from pipelines.tracking import read_run_id
from pipelines.training import checkpoints
from pipelines.training.driver import UNTRACKED, TrainResult
from pipelines.training.train import train
from tests.helpers.trained import SmallWorld
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.slow
FINAL = "model/diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(
    small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, TrainResult]:
    recipe = small_world.recipe(
        tmp_path_factory.mktemp("undisturbed"),
        train={"log_every": 1, "keep_checkpoints": 3, "checkpoint_every": 3},
    )
    return recipe, train(recipe)


def losses(result: TrainResult) -> list[float]:
    points = MlflowClient(result.tracking_uri).get_metric_history(result.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(1, len(points) + 1)), (
        "doubled or lost steps"
    )
    return [point.value for point in sorted(points, key=lambda point: point.step)]


def same_bits(result: TrainResult, model: Path) -> bool:
    straight, again = load_file(result.model / FINAL), load_file(model / FINAL)
    assert straight.keys() == again.keys()
    return all(torch.equal(value, again[name]) for name, value in straight.items())


def step_file(recipe: Recipe, step: int) -> Path:
    return recipe.run_folder / checkpoints.checkpoint_name(step) / "position.json"


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    wait_until(path.exists, 400, lambda: ended(process))


def ended(process: subprocess.Popen[str]) -> str | None:
    """What a process said that is no more."""
    return None if process.poll() is None else process.communicate()[0][-4000:]


@contextmanager
def command(recipe: Recipe, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`lidit train` as a process of its own, with an embedded Ray of its own."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", str(path)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(recipe: Recipe, folder: Path) -> str:
    with command(recipe, folder) as process:
        output = process.communicate(timeout=500)[0]
        assert process.returncode == 0, output[-4000:]
    return output


def test_a_checkpoint_cut_in_half_is_passed_over(
    undisturbed: tuple[Recipe, TrainResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest checkpoint lost half of its bytes before the run is started again: the one before
    it is used.
    """
    recipe, result = undisturbed
    again = recipe.model_copy(update={"output": str(tmp_path)})
    again.run_folder.mkdir()
    for step in (3, 6):
        name = checkpoints.checkpoint_name(step)
        shutil.copytree(recipe.run_folder / name, again.run_folder / name)
    victim = again.run_folder / checkpoints.checkpoint_name(6) / "rank-00000.safetensors"
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    finished = train(again)
    assert "step-000000006 is not usable (rank-00000.safetensors does not match" in caplog.text
    assert same_bits(result, finished.model)
    assert losses_from(finished) == losses(result)[3:]


def losses_from(result: TrainResult) -> list[float]:
    points = MlflowClient(result.tracking_uri).get_metric_history(result.run_id, "train/loss")
    return [point.value for point in sorted(points, key=lambda point: point.step)]


def test_a_checkpoint_that_was_never_finished_is_none(
    undisturbed: tuple[Recipe, TrainResult], tmp_path: Path
) -> None:
    recipe, _ = undisturbed
    folder = tmp_path / checkpoints.checkpoint_name(3)
    shutil.copytree(recipe.run_folder / checkpoints.checkpoint_name(3), folder)
    (folder / "rank-00001.safetensors").unlink()
    assert checkpoints.newest_complete(tmp_path) is None
    (folder / "rank-00001.safetensors").write_bytes(b"half of what was there")
    with pytest.raises(InputError, match="no checkpoint is whole"):
        checkpoints.newest_complete(tmp_path)


def test_a_driver_killed_as_its_model_is_published_tracks_it_at_the_next_start(
    undisturbed: tuple[Recipe, TrainResult], tmp_path: Path
) -> None:
    recipe, result = undisturbed
    again = recipe.model_copy(update={"output": str(tmp_path / "runs")})
    model = again.run_folder / "model"
    with command(again, tmp_path) as process:
        wait_until(model.exists, 400, lambda: ended(process), every=0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run_id = read_run_id(again.run_folder)
    found = train(again)
    assert not found.trained
    assert found.run_id == run_id
    assert same_bits(result, model)
    client = MlflowClient(found.tracking_uri)
    (output,) = client.get_run(run_id).outputs.model_outputs
    tracked = {file.path for file in client.list_logged_model_artifacts(output.model_id)}
    assert {file.name for file in model.iterdir()} <= tracked
    assert "plots/loss.png" in {file.path for file in client.list_artifacts(run_id, "plots")}
    assert client.get_run(run_id).info.status == "FINISHED"
    assert not (again.run_folder / UNTRACKED).exists()


def test_a_killed_driver_costs_nothing_but_time(
    undisturbed: tuple[Recipe, TrainResult], tmp_path: Path
) -> None:
    recipe, result = undisturbed
    again = recipe.model_copy(update={"output": str(tmp_path / "runs")})
    with command(again, tmp_path) as process:
        wait_for(step_file(again, 3), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (again.run_folder / "model").exists()
    finish(again, tmp_path)
    assert same_bits(result, again.run_folder / "model")
    uri, run = f"sqlite:///{tmp_path}/runs/mlflow.db", (again.run_folder / "mlflow-run").read_text()
    assert losses(TrainResult(again.run_folder / "model", 8, uri, run, True)) == losses(result)


def test_sigterm_saves_and_leaves(undisturbed: tuple[Recipe, TrainResult], tmp_path: Path) -> None:
    """As a spot machine or a scheduler asks: a checkpoint of the very step, exit code 130, nothing
    done twice.
    """
    recipe, result = undisturbed
    settings = recipe.train.model_copy(
        update={"checkpoint_every": 1000, "steps": 400, "log_every": 1}
    )
    again = recipe.model_copy(update={"output": str(tmp_path / "runs"), "train": settings})
    uri, run = f"sqlite:///{tmp_path}/runs/mlflow.db", again.run_folder / "mlflow-run"
    with command(again, tmp_path) as process:
        wait_for(run, process)
        client = MlflowClient(uri)
        wait_until(
            lambda: len(client.get_metric_history(run.read_text(), "train/loss")) >= 3,
            300,
            lambda: ended(process),
            every=0.1,
        )
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=200)[0]
    assert process.returncode == 130, output[-4000:]
    assert "the same command goes on" in output
    newest = checkpoints.newest_complete(again.run_folder)
    assert newest is not None
    saved = checkpoints.read_position(newest).step
    assert 3 <= saved < 400
    assert client.get_run(run.read_text()).info.status == "KILLED"
    logged = losses(TrainResult(again.run_folder / "model", saved, uri, run.read_text(), True))
    assert len(logged) == saved, "steps after the checkpoint were done for nothing"
    assert logged[:8] == losses(result)[: len(logged[:8])]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on(
    undisturbed: tuple[Recipe, TrainResult], tmp_path: Path
) -> None:
    recipe, result = undisturbed
    with small_disk(tmp_path / "disk", "24m") as disk:
        engine = recipe.engine.model_copy(update={"max_failures": 0})
        again = recipe.model_copy(update={"output": str(disk / "runs"), "engine": engine})
        with command(again, tmp_path) as process:
            wait_for(step_file(again, 3), process)
            ballast = (disk / "ballast").open("wb", buffering=0)
            filler = threading.Thread(target=fill, args=(ballast, process))
            filler.start()
            output = process.communicate(timeout=400)[0]
            filler.join()
        assert process.returncode == 1, output[-4000:]
        failed = [line for line in output.splitlines() if line.startswith("failed: ")]
        assert len(failed) == 1, output[-4000:]
        assert "no space left on the disk" in failed[0]
        assert "run the same command again" in failed[0]
        assert "Traceback" not in output, output[-6000:]
        ballast.truncate(0)
        finish(again, tmp_path)
        assert same_bits(result, again.run_folder / "model")


def fill(ballast: object, process: subprocess.Popen[str]) -> None:
    """Take whatever room there is, again and again, as long as the process lives."""
    while process.poll() is None:
        try:
            ballast.write(bytes(4096))  # type: ignore[attr-defined]
        except OSError:  # full: until the process gives room back or ends there is nothing to take
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.01)


@pytest.mark.parametrize(("before", "after", "stage"), [(2, 1, 2), (1, 2, 3), (2, 3, 1)])
def test_another_number_of_workers_sees_the_same_batches(
    undisturbed: tuple[Recipe, TrainResult],
    small_world: SmallWorld,
    tmp_path: Path,
    before: int,
    after: int,
    stage: int,
) -> None:
    recipe, result = undisturbed
    first = recipe.model_copy(
        update={
            "output": str(tmp_path),
            "engine": recipe.engine.model_copy(update={"workers": before}),
            "train": recipe.train.model_copy(update={"steps": 4}),
        }
    )
    train(first)
    second = recipe.model_copy(
        update={
            "output": str(tmp_path),
            "engine": recipe.engine.model_copy(update={"workers": after, "zero_stage": stage}),
        }
    )
    with pytest.raises(InputError, match=r"config.train.steps: 4 -> 8"):
        train(second)
    finished = train(second, allow_drift=True)
    assert losses(finished) == pytest.approx(losses(result), rel=1e-5)
    straight, moved = load_file(result.model / FINAL), load_file(finished.model / FINAL)
    for name, value in straight.items():
        # At this width GroupNorm takes every channel's own mean away: the bias before it has no
        # gradient but rounding, of which Adam makes whole steps.
        if name != "transformer.position.convolution1.bias":
            torch.testing.assert_close(moved[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_node_leaves_for_good_and_the_run_goes_on_with_the_rest(
    undisturbed: tuple[Recipe, TrainResult], tmp_path: Path
) -> None:
    recipe, result = undisturbed
    engine = recipe.engine.model_copy(update={"min_workers": 1, "resources": {"trainer": 1.0}})
    settings = recipe.train.model_copy(update={"keep_checkpoints": 8, "checkpoint_every": 1})
    again = recipe.model_copy(
        update={"output": str(tmp_path / "runs"), "engine": engine, "train": settings}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(again.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "elastic_scenario.py", path],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "PlacementGroupCleaner" not in line]
    assert done.returncode == 0, "\n".join(said)[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["workers"]["1"] == 2
    assert found["workers"]["8"] == 1
    finished = TrainResult(again.run_folder / "model", 8, found["uri"], found["run"], True)
    assert losses(finished) == pytest.approx(losses(result), rel=1e-5)
