"""Where a run comes from: the command without secrets, data sets with schema, links to what made
them.
"""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from lidit.config import TrackingSettings
from lidit.store import Corpus
from pipelines import tracking
from pipelines.tracking.inputs import corpus_input, family_input
from pipelines.tracking.origin import command_line
from pipelines.tracking.runs import first_page
from pipelines.tracking.stages import Stage, track_stage

RELEASED = Path(__file__).parents[2] / "fixtures" / "first_release"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/venv/bin/lidit", "train", "demo", "train.steps=2"], "lidit train demo train.steps=2"),
        (["/code/jobs/train_codec.py", "a b.yaml"], "lidit train-codec 'a b.yaml'"),
        (["lidit", "ingest", "https://me:word@host/x"], "lidit ingest ..."),
        (["lidit", "sample", "\x1b[2J"], "lidit sample '\\x1b[2J'"),
    ],
)
def test_the_command_as_it_is_typed_again(words: list[str], shown: str) -> None:
    assert command_line(words) == shown


def test_a_training_leads_to_the_stages_behind_it(tmp_path: Path) -> None:
    corpus = Corpus.open(str(RELEASED / "corpus"))
    family = family_input(corpus.text_family(corpus.text_families()[0].directory))
    assert json.loads(family.schema["mlflow_tensorspec"]["features"])[0]["tensor-spec"][
        "shape"
    ] == [-1, 32]
    uri = tracking.local_store(tmp_path)
    settings = TrackingSettings(uri=uri, experiment="test")
    stage = Stage(
        "embed", family.name, family, corpus_input(corpus), {"layer": "-2"}, {"bytes": 57078.0}
    )
    for _ in range(2):  # the second call goes on with the same run
        track_stage(stage, settings, None)
    tags = {"mlflow.note.content": "trained", "lidit.made_from": f"{family.digest} other"}
    with tracking.tracked_run(uri, "test", "run", "key", {}, tags, tmp_path):
        pass
    client = MlflowClient(uri)
    runs = {
        run.info.run_name: run
        for run in client.search_runs([client.get_experiment_by_name("test").experiment_id])
    }
    made = runs[f"embed {family.name}"]
    assert made.data.metrics == {"embed/bytes": 57078.0}
    assert {entry.tags[0].value for entry in made.inputs.dataset_inputs} == {"embed", "made"}
    assert (
        f"/runs/{made.info.run_id}?workflowType=machine_learning)"
        in runs["run"].data.tags["mlflow.note.content"]
    )


def test_the_pages_begin_with_the_runs(tmp_path: Path) -> None:
    uri = tracking.local_store(tmp_path)
    client = MlflowClient(uri)  # a store has an experiment Default
    assert first_page(uri) == "#/experiments?workflowType=machine_learning"
    with tracking.tracked_run(uri, "test", "run", "key", {}, {}, tmp_path):
        pass
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    assert "Trainings of LI-DiT" in experiment.tags["mlflow.note.content"]
    page = f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning"
    assert first_page(uri) == page


def test_without_a_store_a_stage_is_not_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = corpus_input(Corpus.open(str(RELEASED / "corpus")))
    track_stage(Stage("ingest", "corpus", data, None, {}, {}), None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_is_sent_again_is_shown_once(tmp_path: Path) -> None:
    uri, picture = tracking.local_store(tmp_path), tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    with tracking.tracked_run(uri, "test", "run", "key", {}, {}, tmp_path) as run:
        for _ in range(2):
            run.image(picture, "samples", 3)
    names = [each.path for each in MlflowClient(uri).list_artifacts(run.handle.run_id, "images")]
    assert sorted(Path(name).suffix for name in names) == [".png", ".webp"]


def test_the_description_shows_the_newest_picture(tmp_path: Path) -> None:
    uri, client = tracking.local_store(tmp_path), MlflowClient(tracking.local_store(tmp_path))
    for grey in (1, 5, 3):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(tmp_path / f"{grey}.png")
    tags = {"mlflow.note.content": "as people edited it"}
    with tracking.tracked_run(uri, "test", "run", "key", {}, tags, tmp_path) as run:
        # The store was silent when the picture of step 3 was drawn.
        for step in (1, 5, 3):
            run.image(tmp_path / f"{step}.png", "samples", step)
    run_id = run.handle.run_id
    shown = f"![samples](get-artifact?path=samples.png&run_uuid={run_id})"
    described = client.get_run(run_id).data.tags["mlflow.note.content"]
    assert described == f"as people edited it\n\n{shown}"
    with Image.open(client.download_artifacts(run_id, "samples.png", str(tmp_path))) as newest:
        assert newest.getpixel((0, 0)) == (5, 5, 5)
    # Who takes it out wants it out.
    client.set_tag(run_id, "mlflow.note.content", "short")
    with tracking.tracked_run(uri, "test", "run", "key", {}, tags, tmp_path) as run:
        run.image(tmp_path / "5.png", "samples", 7)
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "short"


def test_a_parent_of_another_store_is_left_out(tmp_path: Path) -> None:
    uri = tracking.local_store(tmp_path)
    with tracking.tracked_run(
        uri, "test", "run", "key", {}, {tracking.PARENT: "0" * 32}, tmp_path
    ) as run:
        pass
    assert tracking.PARENT not in MlflowClient(uri).get_run(run.handle.run_id).data.tags
