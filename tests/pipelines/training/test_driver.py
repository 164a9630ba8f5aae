"""The driver: what it says when Ray gives up, and runs that are opened, refused, finished."""

import errno
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lidit.config import Recipe
from lidit.errors import InputError, JobError
from pipelines.training.driver import UNTRACKED, _job_error, open_run
from tests.helpers.trained import SmallWorld

FACTS = {"config": {"seed": 0}, "corpus": "c"}


def test_a_full_disk_is_told_with_its_remedy_and_anything_else_by_its_last_line() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "make room and run the same command again" in str(_job_error(full))
    assert "make room" in str(
        _job_error(RuntimeError("write failed: No space left on device (os error 28)"))
    )
    other = _job_error(RuntimeError("Traceback\n  somewhere\nValueError: a peer is gone\n"))
    assert str(other) == "training failed: ValueError: a peer is gone"
    assert isinstance(other, JobError)


def recipe_in(small_world: SmallWorld, folder: Path) -> Recipe:
    return small_world.recipe(folder, engine={"workers": 1})


def publish_by_hand(folder: Path, step: int) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "finished.json").write_text(json.dumps({"step": step}))


def test_a_run_with_other_facts_is_refused_unless_drift_is_allowed(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    recipe, corpus = recipe_in(small_world, tmp_path), small_world.open()
    with open_run(recipe, corpus, FACTS, {}, allow_drift=False) as run:
        assert not run.finished
    other = {**FACTS, "corpus": "d"}
    refused = open_run(recipe, corpus, other, {}, allow_drift=False)
    with pytest.raises(InputError, match=r'corpus: "c" -> "d"(.|\n)*--allow-drift'):
        refused.__enter__()
    with open_run(recipe, corpus, other, {}, allow_drift=True) as run:
        assert json.loads((run.folder / "run.json").read_text()) == other


def test_a_finished_run_tracks_only_what_a_kill_left_untracked(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    recipe, corpus = recipe_in(small_world, tmp_path), small_world.open()
    with open_run(recipe, corpus, FACTS, {}, allow_drift=False) as run:
        publish_by_hand(run.folder, recipe.train.steps)
        (run.folder / UNTRACKED).touch()
        run_id = run.tracker.handle.run_id
        folder = run.folder
    # The block ended without an error, so the mark is gone; a kill would have left it.
    assert not (folder / UNTRACKED).exists()
    (folder / UNTRACKED).touch()
    with open_run(recipe, corpus, FACTS, {}, allow_drift=False) as run:
        assert run.finished
        assert run.result.run_id == run_id
        assert (run.result.step, run.result.trained) == (recipe.train.steps, False)
    assert not (folder / UNTRACKED).exists()
    files = MlflowClient(run.result.tracking_uri).list_artifacts(run_id, "model")
    assert [file.path for file in files] == ["model/finished.json"]


def test_an_error_in_the_block_fails_the_trackers_run(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    recipe, corpus = recipe_in(small_world, tmp_path), small_world.open()
    with (
        pytest.raises(JobError, match="a worker failed"),
        open_run(recipe, corpus, FACTS, {}, False) as run,
    ):
        raise JobError("a worker failed")
    assert MlflowClient(run.tracking_uri).get_run(run.tracker.handle.run_id).info.status == "FAILED"
