"""Passwords, keys and tokens stay where they belong: planted ones are in no log, record, artifact
or model folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

from lidit.config import EncoderSettings, Recipe, TrackingSettings
from lidit.config.settings import validate
from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
from lidit.errors import InputError
from pipelines import tracking
from pipelines.corpus.ingest import run_ingest
from pipelines.training import driver
from tests.helpers.tiny_models import tiny_llm
from tests.infra.test_mlflow_server import ADMIN_PASSWORD, documents, running_server

__all__ = ["documents"]

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-7c0e5d",
    "RAY_AUTH_TOKEN": "planted-ray-token-91bf3a66",
    "MLFLOW_TRACKING_TOKEN": "planted-mlflow-token-44d1",
}
RECIPE = """
name: secrets
output: runs
corpus: corpus
sources: [scenes]
ingest: {resolution: 32, bucket_multiple: 8, unit_samples: 20}
encoders: [{name: llama, model: ./llama}]
model: {width: 32, depth: 1, heads: 2, patch_size: 8, refiner: {depth: 1}}
objective: {kind: clean, timesteps: uniform}
train: {steps: 2, batch_size: 12, checkpoint_every: 2, log_every: 1}
sampler: {steps: 2}
evaluate: {per_tag: 1, tags: [single_object]}
"""


def holding(folder: Path, secret: str) -> list[str]:
    """Every file below `folder` that holds the secret, except where it was put on purpose."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes():
            found.append(str(path.relative_to(folder)))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planted_secrets_are_nowhere(
    documents: list[dict[str, Any]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A whole chain that logs into a server with a login, whose address holds the password."""
    write_scene_shards(tmp_path / "scenes", SceneSet(40, 32, seed=1))
    tiny_llm(tmp_path / "llama", "llama")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    home, server = tmp_path_factory.mktemp("h"), tmp_path_factory.mktemp("server")
    backend, auth = f"sqlite:///{server}/mlflow.db", f"sqlite:///{server}/auth.db"
    with running_server(documents, server, backend, auth, {}) as url:
        planted = url.replace("://", f"://admin:{quote(ADMIN_PASSWORD)}@")
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_TRACKING"))}
        env |= {
            **SECRETS,
            "HOME": str(home),
            "RAY_TMPDIR": str(home),
            "MLFLOW_TRACKING_URI": planted,
        }
        env.pop("MLFLOW_TRACKING_TOKEN")  # the server wants a login
        done = subprocess.run(
            [Path(sys.executable).with_name("lidit"), "run", "recipe.yaml"],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        # The password reached the worker on rank 0, and no place in which it could be read.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
            patch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN_PASSWORD)
            client = MlflowClient(url)
            runs = client.search_runs([client.get_experiment_by_name("lidit").experiment_id])
            trained = next(run for run in runs if run.data.tags["lidit.job"] == "train")
            assert [
                point.step for point in client.get_metric_history(trained.info.run_id, "train/loss")
            ] == [1, 2]
    assert len(runs) == 2
    assert list((server / "artifacts").rglob("model_index.json"))
    assert holding(tmp_path, "single_object")
    assert holding(home, "RayTrainWorker"), "Ray's logs were to be searched"
    for name, secret in {
        **SECRETS,
        "password": ADMIN_PASSWORD,
        "quoted": f"admin:{quote(ADMIN_PASSWORD)}",
    }.items():
        assert secret not in done.stdout + done.stderr, name
        for folder in (tmp_path, home, server):
            assert holding(folder, secret) == [], name


def test_an_address_with_a_password_leaves_it_to_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p%40ss%2Fw@mlflow.example.com:5000/path")
    assert tracking.store_uri(None, tmp_path) == "https://mlflow.example.com:5000/path"
    assert tracking.credentials()["MLFLOW_TRACKING_PASSWORD"] == "", (
        "asking for the address changes nothing"
    )
    tracking.sign_in("http://other:5000")
    assert tracking.credentials()["MLFLOW_TRACKING_PASSWORD"] == "", (
        "the password is for one server"
    )
    tracking.sign_in("https://mlflow.example.com:5000/path")
    assert tracking.credentials()["MLFLOW_TRACKING_USERNAME"] == "me"
    assert tracking.credentials()["MLFLOW_TRACKING_PASSWORD"] == "p@ss/w"
    assert tracking.store_uri("http://other:5000", tmp_path) == "http://other:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@db/mlflow")
    with pytest.raises(InputError, match="PGPASSWORD") as caught:
        tracking.store_uri(None, tmp_path)
    assert "hunter2" not in str(caught.value)
    for address in (
        "https://hunter2@mlflow.example.com",
        "https://mlflow.example.com/?token=hunter2",
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(InputError, match="MLFLOW_TRACKING_TOKEN") as caught:
            tracking.store_uri(None, tmp_path)
        assert "hunter2" not in str(caught.value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.store_uri(None, tmp_path) == tracking.local_store(tmp_path)


def test_settings_refuse_passwords_without_repeating_them(tmp_path: Path) -> None:
    encoder = {"name": "e", "model": "m"}
    recipe = {"name": "r", "corpus": "c", "encoders": [encoder]}
    secret = "https://me:hunter2@example.com/x"
    for kind, tree, where in (
        (Recipe, {**recipe, "tracking": {"uri": secret}}, "tracking.uri"),
        (Recipe, {**recipe, "sources": [secret]}, "sources"),
        (Recipe, {**recipe, "corpus": secret}, "corpus"),
        (Recipe, {**recipe, "encoders": [{**encoder, "model": secret}]}, "encoders.0.model"),
        (EncoderSettings, {**encoder, "model": secret}, "model"),
    ):
        with pytest.raises(InputError, match=f"^r.yaml: {where}: .*password") as caught:
            validate(kind, tree, "r.yaml")
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="password") as raw:  # nor does pydantic's own text
        TrackingSettings(uri=secret)
    assert "hunter2" not in str(raw.value)
    with pytest.raises(InputError, match=r"example\.com/x: .*password") as caught:
        run_ingest([secret], str(tmp_path / "c"), Recipe.model_validate(recipe).ingest)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(InputError, match="password"):  # what stands before the @ may be a token
        validate(TrackingSettings, {"uri": "http://me@example.com:5000"}, "")
    assert (
        validate(TrackingSettings, {"uri": "http://example.com:5000"}, "").uri
        == "http://example.com:5000"
    )


def test_no_secret_is_in_what_ray_records_of_a_worker() -> None:
    secret = ("PASSWORD", "TOKEN", "SECRET", "KEY")
    assert not [name for name in driver.WORKER_ENVIRONMENT if any(word in name for word in secret)]
