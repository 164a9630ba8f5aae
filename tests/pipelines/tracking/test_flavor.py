"""A tracked model folder is an MLflow model: found by its alias, it draws what the
pipeline draws.
"""

import base64
import io
import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT
from mlflow.pyfunc import scoring_server
from PIL import Image
from starlette.testclient import TestClient

from lidit.pipeline import LIDiTPipeline
from pipelines import tracking
from pipelines.tracking.flavor import write_flavor
from pipelines.tracking.tracker import tracked_run

RELEASED = Path(__file__).parents[2] / "fixtures" / "first_release"
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(RELEASED / "model", tmp_path / "run" / "model"))
    for path in (folder / "encoders").glob("*.json"):
        facts = json.loads(path.read_text())
        facts["settings"]["model"] = str(RELEASED / "llms" / facts["name"])
        path.write_text(json.dumps(facts))
    return folder


def test_the_alias_loads_a_model_that_draws(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIDIT_CACHE", str(tmp_path / "cache"))
    # with checksums, as a training leaves it
    LIDiTPipeline.from_pretrained(model).save_pretrained(model)
    uri, run = tracking.local_store(tmp_path), tmp_path / "run"
    with tracked_run(uri, "test", "run", "key", {}, {}, run) as tracker:
        tracker.metrics({"train/loss": 0.5}, 4)
        tracker.model(model, "model", 4)
        tracker.model(write_flavor(run / "mlflow-model", PROMPTS[0]), "model", 4)
        tracker.model_is_whole("model", 4)
        tracker.register("lidit", "model", "newest", "after 4 steps")
    with tracked_run(
        uri, "test", "scores", "other", {}, {tracking.PARENT: tracker.handle.run_id}, run
    ) as scores:
        scores.metrics({"scenes/overall": 0.75}, 0, tracker.handle.run_id)
    client = mlflow.MlflowClient(uri)
    version = client.get_model_version_by_alias("lidit", "newest")
    assert version.description == "after 4 steps"
    (output,) = client.get_run(tracker.handle.run_id).outputs.model_outputs
    assert output.model_id in version.source
    logged = client.get_logged_model(output.model_id)
    assert {metric.key: metric.value for metric in logged.metrics} == {
        "train/loss": 0.5,
        "scenes/overall": 0.75,
    }
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        loaded = mlflow.pyfunc.load_model("models:/lidit@newest")
    finally:
        mlflow.set_tracking_uri(before)
    pngs = loaded.predict(PROMPTS, params={"seed": 3, "steps": 2})
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in pngs]
    pipe = LIDiTPipeline.from_pretrained(model)
    expected = pipe(PROMPTS, seed=[3, 4], num_inference_steps=2).images
    np.testing.assert_array_equal(
        np.stack(found), np.stack([np.asarray(image) for image in expected])
    )
    # What `mlflow models serve` runs; it sets this variable, which ends with the test.
    monkeypatch.setenv(_MLFLOW_IS_IN_SERVING_ENVIRONMENT.name, "true")
    asked = {"inputs": PROMPTS, "params": {"seed": 3, "steps": 2}}
    answer = TestClient(scoring_server.init(loaded)).post("/invocations", json=asked)
    assert answer.json()["predictions"] == pngs
    own = loaded.predict(PROMPTS[:1])
    assert base64.b64decode(own[0]).startswith(b"\x89PNG")
    assert loaded.metadata.signature.params.to_dict()[0]["name"] == "seed"
    assert not list((tmp_path / "artifacts").rglob("*.pkl"))
    requirements = next((tmp_path / "artifacts").rglob("requirements.txt")).read_text()
    assert "lidit-pipeline==" in requirements
    assert "torch==" in requirements
