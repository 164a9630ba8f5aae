"""The driver: what it says when Ray gives up, and runs that are opened, refused, finished."""

import errno
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lidit.config import Recipe
from lidit.errors import InputError, JobError
from pipelines.training.drift import settings_facts
from pipelines.training.driver import UNTRACKED, _job_error, open_run
from pipelines.training.train import FREE_SETTINGS
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


def test_how_fast_a_run_goes_is_no_drift_of_older_runs(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    recipe, corpus = recipe_in(small_world, tmp_path), small_world.open()
    older = {"config": {"engine": {"compile": False, "precision": "float32"},
                        "model": {"activation_checkpointing": True, "width": 8}}}  # fmt: skip
    with open_run(recipe, corpus, older, {}, allow_drift=False):
        pass
    now = {"config": {"engine": {"compile": True, "precision": "float32"}, "model": {"width": 8}}}
    with open_run(recipe, corpus, now, {}, allow_drift=False):
        pass
    other = {"config": {"engine": {"precision": "bfloat16"}, "model": {"width": 8}}}
    with pytest.raises(InputError, match=r"engine\.precision"):
        open_run(recipe, corpus, other, {}, allow_drift=False).__enter__()


def test_settings_newer_than_a_run_are_no_facts_until_they_are_set(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    """Arms of an ablation are known by a digest of their facts: one key more, and none would be
    found again.
    """
    recipe = recipe_in(small_world, tmp_path)
    config = settings_facts(recipe, FREE_SETTINGS)
    assert config["engine"]["compile"] is False
    assert not {"sort_by_unit", "readers"} & set(config["data"])
    assert "checkpointed_every" not in config["model"]
    sorting = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"sort_by_unit": True})}
    )
    assert settings_facts(sorting, FREE_SETTINGS)["data"]["sort_by_unit"] is True


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
