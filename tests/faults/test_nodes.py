"""Several Ray nodes with different resources, shared storage by S3: a node dies in each stage, all
ends right.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
from lidit.store import Corpus
from tests.helpers.tiny_models import tiny_llm

ROOT = Path(__file__).parents[2]
RECIPE = """
name: nodes
output: runs
corpus: corpus
sources: [scenes]
ingest: {resolution: 32, bucket_multiple: 8, unit_samples: 10}
encoders:
  - {name: llama, model: ./llama}
  - {name: qwen2, model: ./qwen2, storage: int8}
model: {width: 32, depth: 1, heads: 2, patch_size: 8, refiner: {depth: 1}}
objective: {kind: clean, timesteps: uniform}
train: {steps: 30, batch_size: 12, checkpoint_every: 3, log_every: 5}
engine: {workers: 2}
"""
WEIGHTS = "nodes/model/model/diffusion_pytorch_model.safetensors"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_dies_in_every_stage(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("n")
    write_scene_shards(folder / "scenes", SceneSet(400, 32, seed=3, per_shard=50))
    for family in ("llama", "qwen2"):
        tiny_llm(folder / family, family)
    (folder / "recipe.yaml").write_text(RECIPE)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    environment["PYTHONPATH"] = str(ROOT)

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
        )

    done = run(sys.executable, ROOT / "tests" / "helpers" / "nodes_scenario.py", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, found["log"]
    assert found["killed"] == {
        s: {"in_the_middle": True} for s in ("ingest", "embed", "latents", "train")
    }
    assert found["sound"]

    undisturbed = run(
        Path(sys.executable).with_name("lidit"), "run", "recipe.yaml", "--until", "train"
    )
    assert undisturbed.returncode == 0, undisturbed.stderr[-4000:]
    corpus = Corpus.open(folder / "corpus")
    assert found["corpus"] == corpus.digest
    assert found["text"] == {name: corpus.text_family(name).digest for name in ("llama", "qwen2")}
    assert found["latents"] == corpus.latent_family("pixels").digest
    straight, resumed = (load_file(folder / runs / WEIGHTS) for runs in ("runs", "cluster-runs"))
    assert straight.keys() == resumed.keys()
    assert all(bool((straight[name] == resumed[name]).all()) for name in straight)
