"""A scorecard's promises: known by its identity, complete when its score file is there, one run in
the tracker.
"""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from lidit.config import TrackingSettings
from lidit.errors import InputError
from pipelines.evaluation.scorecard import Job, Scorecard
from pipelines.tracking import local_store

MADE_WITH = {"model": {"weights": "abc"}, "settings": {"seed": 1}}
# sha256 of MADE_WITH as canonical JSON: score files of earlier versions carry it.
IDENTITY = "2b20e22f72498401040e2a37c30d301455033389ae35231ac353f2cd9f45a41d"


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    return TrackingSettings(uri=local_store(tmp_path_factory.mktemp("store")))


def card_of(
    out: Path, tracker: TrackingSettings, file: str | None = "scores.json", **made_with: object
) -> Scorecard:
    job = Job.of_model(
        "evaluate", out / "demo" / "model", "evaluate", {"seed": "1"}, "scenes", file
    )
    return Scorecard(out, job, MADE_WITH | made_with, tracker)


def run_of(tracker: TrackingSettings, card: Scorecard) -> Run:
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name(tracker.experiment)
    assert experiment is not None
    key = card.identity[:32]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`lidit.run_key` = '{key}'")
    return run


def test_a_score_file_of_an_earlier_version_is_recognised(
    tmp_path: Path, tracker: TrackingSettings
) -> None:
    earlier = {
        "identity": IDENTITY,
        "made_with": MADE_WITH,
        "metrics": {"overall": 0.5},
        "table": "| a |",
    }
    (tmp_path / "scores.json").write_text(json.dumps(earlier, indent=1))
    assert card_of(tmp_path, tracker).known("metrics", "table") == earlier
    assert card_of(tmp_path, tracker).known("metrics", "motifs") is None
    assert card_of(tmp_path, tracker, settings={"seed": 2}).known("metrics") is None
    assert card_of(tmp_path, tracker, file=None).known("metrics") is None


def test_the_old_score_file_goes_first_and_the_new_one_comes_last(
    tmp_path: Path, tracker: TrackingSettings
) -> None:
    card = card_of(tmp_path, tracker)
    (tmp_path / "scores.json").write_text("of the files as they were")
    card.begin()
    assert not (tmp_path / "scores.json").exists()
    (tmp_path / "table.md").write_text("| b |")
    card.publish({"overall": 0.5}, ["table.md"], {"identity": card.identity})
    assert card.known() == {"identity": card.identity}
    run = run_of(tracker, card)
    assert run.info.status == "FINISHED"
    assert run.info.end_time <= (tmp_path / "scores.json").stat().st_mtime_ns / 1e6  # milliseconds


def test_the_tracker_gets_one_run_per_identity(tmp_path: Path, tracker: TrackingSettings) -> None:
    """Name, tags, parameters and metrics are those of earlier versions, so that runs are continued,
    not doubled.
    """
    card = card_of(tmp_path, tracker, settings={"seed": 3})
    for _ in range(2):
        card.begin()
        (tmp_path / "table.md").write_text("| b |")
        card.publish({"overall": 0.5}, ["table.md"], {})
    run = run_of(tracker, card)
    assert run.info.run_name == "evaluate demo"
    ours = {
        name: value
        for name, value in run.data.tags.items()
        if name in ("lidit.job", "lidit.model", "lidit.identity")
    }
    assert ours == {
        "lidit.job": "evaluate",
        "lidit.model": str(tmp_path / "demo" / "model"),
        "lidit.identity": card.identity,
    }
    assert run.data.params == {"seed": "1"}
    assert run.data.metrics == {"scenes/overall": 0.5}
    assert [file.path for file in MlflowClient(tracker.uri).list_artifacts(run.info.run_id)] == [
        "table.md"
    ]


def test_the_description_has_the_table_and_the_first_picture(
    tmp_path: Path, tracker: TrackingSettings
) -> None:
    card = card_of(tmp_path, tracker, settings={"seed": 5})
    card.begin()
    for name in ("grid.png", "positions.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    card.publish({"overall": 0.5}, ["grid.png", "positions.png"], {"table": "| b |"})
    run = run_of(tracker, card)
    assert run.data.tags["mlflow.note.content"] == (
        f"Of the model `{tmp_path / 'demo' / 'model'}`.\n\n| b |\n\n"
        f"![grid](get-artifact?path=grid.png&run_uuid={run.info.run_id})"
    )
    files = MlflowClient(tracker.uri).list_artifacts(run.info.run_id)
    assert {file.path for file in files} == {"grid.png", "positions.png"}


def test_without_a_score_file_nothing_is_recognised_or_left_behind(
    tmp_path: Path, tracker: TrackingSettings
) -> None:
    card = card_of(tmp_path / "out", tracker, file=None, settings={"seed": 4})
    card.begin()
    card.publish({"overall": 0.5}, [])
    assert card.known() is None
    assert list((tmp_path / "out").iterdir()) == []
    assert "lidit.identity" not in run_of(tracker, card).data.tags


def test_a_refused_experiment_is_told_before_the_work(
    tmp_path: Path, tracker: TrackingSettings
) -> None:
    gone = tracker.model_copy(update={"experiment": "gone"})
    client = MlflowClient(gone.uri)
    client.delete_experiment(client.create_experiment("gone"))
    (tmp_path / "scores.json").write_text("of the files as they are")
    worked = []
    with (
        pytest.raises(InputError, match="'gone' was deleted"),
        card_of(tmp_path, gone).evaluating(),
    ):
        worked.append(1)
    assert not worked
    assert (tmp_path / "scores.json").exists()
