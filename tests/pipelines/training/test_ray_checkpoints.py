"""A run's checkpoints as Ray Train lists them: at every start the list agrees with the folders, for
Ray's own code.
"""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from pipelines.training import checkpoints, ray_checkpoints

BEST = CheckpointConfig(
    num_to_keep=2, checkpoint_score_attribute="validation_loss", checkpoint_score_order="min"
)
NEWEST = CheckpointConfig(num_to_keep=2)


def write(run: Path, step: int, content: bytes = b"numbers") -> None:
    """A checkpoint as far as its records go: one rank, one file."""
    folder = run / checkpoints.checkpoint_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rank-00000.safetensors").write_bytes(content)
    position = checkpoints.Position(step, 1, step, {}, "a")
    (folder / "position.json").write_text(json.dumps(position.__dict__))
    checkpoints.write_record(folder, 0, position)


def session(
    run: Path, config: CheckpointConfig, work: Callable[[Callable[[int, float], None]], None]
) -> None:
    """One driver's life: Ray reads its list, `work` reports checkpoints."""

    async def live() -> None:
        context = StorageContext(storage_path=str(run.parent), experiment_dir_name=run.name)
        manager = CheckpointManager(config, context)

        def report(step: int, loss: float) -> None:
            write(run, step)
            at = Checkpoint(
                str(run / checkpoints.checkpoint_name(step)), filesystem=context.storage_filesystem
            )
            metrics = {"step": step, "validation_loss": loss}
            manager.register_checkpoint(
                _TrainingReport(metrics=metrics, checkpoint=at, validation=False)
            )

        work(report)

    asyncio.run(live())


def start(run: Path, config: CheckpointConfig, *steps: int) -> list[str]:
    """What a new driver does: find where to go on, make the list agree, take `steps`. The folders
    that are left.
    """
    ray_checkpoints.agree(run, checkpoints.newest_complete(run))
    session(run, config, lambda report: [report(step, 1 / step) for step in steps] and None)
    return sorted(path.name[-1] for path in checkpoints.candidates(run))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    assert start(path, NEWEST, 1, 2, 3) == ["2", "3"]
    return path


def test_a_checkpoint_that_was_deleted_by_hand_is_no_obstacle(run: Path) -> None:
    shutil.rmtree(run / checkpoints.checkpoint_name(3))
    assert start(run, NEWEST, 3, 4, 5) == ["4", "5"]
    for path in checkpoints.candidates(run):
        shutil.rmtree(path)
    assert start(run, NEWEST, 1) == ["1"]


def test_a_step_taken_again_is_listed_once(run: Path) -> None:
    (run / checkpoints.checkpoint_name(3) / "rank-00000.safetensors").write_bytes(b"rotten!")
    # with two entries of one folder Ray would delete the good one
    assert start(run, NEWEST, 3) == ["2", "3"]
    assert start(run, NEWEST, 4) == ["3", "4"]
    assert len(list(run.glob("*.damaged"))) == 1


def test_what_was_never_finished_is_removed(run: Path) -> None:
    write(run, 4, b"all of it")
    (run / checkpoints.checkpoint_name(4) / "rank-00000.safetensors").unlink()
    assert start(run, NEWEST, 4) == ["3", "4"]
    assert not list(run.glob("*.damaged"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"ray_version": "0.1"}'])
def test_a_list_that_cannot_be_used_is_set_aside(run: Path, content: str) -> None:
    (listed,) = run.glob("*snapshot*.json")
    listed.write_text(content)
    assert start(run, NEWEST, 4) == ["2", "3", "4"]
    (listed,) = run.glob("*snapshot*.json")
    assert json.loads(listed.read_text())["ray_version"] == ray.__version__


def test_a_loss_that_was_never_measured_is_the_worst(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    session(run, BEST, lambda report: report(1, float("inf")))
    assert start(run, BEST, 2, 3) == ["2", "3"]
