"""What the first release wrote is read by today's code: corpus, families, model folder, a run that
goes on.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from lidit.codecs import codec_spec
from lidit.config import CodecSettings, EncoderSettings, IngestSettings, Recipe
from lidit.pipeline import LIDiTPipeline, image_bytes
from lidit.store import Corpus, digest_of
from lidit.store.verify import verify_corpus
from lidit.text import PromptEncoder, resolve_encoder
from pipelines.corpus.ingest import run_ingest
from pipelines.training.train import train

RELEASED = Path(__file__).parent / "fixtures" / "first_release"
STORAGE = {"llama": "bfloat16", "qwen2": "int8", "mistral": "float32"}
PROMPTS = ["a red circle", "a blue square left of a green triangle"]


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A copy to work in: nothing may change the original."""
    return Path(shutil.copytree(RELEASED, tmp_path / "released"))


def encoder(released: Path, name: str) -> EncoderSettings:
    return EncoderSettings(name=name, model=str(released / "llms" / name), storage=STORAGE[name])


def test_the_corpus_is_sound_and_its_fingerprints_are_todays(released: Path) -> None:
    report = verify_corpus(str(released / "corpus"), deep=True)
    assert report.problems == []
    corpus = Corpus.open(released / "corpus")
    assert (corpus.num_units, corpus.num_samples) == (3, 24)
    assert corpus.digest == json.loads((RELEASED / "run" / "run.json").read_text())["corpus"]
    for name in STORAGE:
        assert (
            resolve_encoder(encoder(released, name)).fingerprint
            == corpus.text_family(name).fingerprint
        )
    assert (
        digest_of(codec_spec(CodecSettings(name="pixels")))
        == corpus.latent_family("pixels").fingerprint
    )


@pytest.mark.parametrize("name", STORAGE)
def test_stored_states_are_what_the_llm_gives_today(released: Path, name: str) -> None:
    corpus = Corpus.open(released / "corpus")
    family, captions = corpus.text_family(name), corpus.captions(1)["text"].to_pylist()
    fresh = PromptEncoder.load(resolve_encoder(encoder(released, name))).encode(captions)
    deviation = family.shared().deviation
    for stored, computed in zip(family.read(1), fresh, strict=True):
        assert stored.shape == computed.states.shape
        error = ((stored.float() - computed.states.float()) / deviation).square().mean().sqrt()
        assert error < {"bfloat16": 0.01, "int8": 0.02, "float32": 1e-5}[STORAGE[name]]


def test_ingest_makes_the_same_corpus(ray_cluster: None, released: Path, tmp_path: Path) -> None:
    settings = IngestSettings(resolution=32, bucket_multiple=8, unit_samples=8)
    made = run_ingest([str(released / "scenes")], str(tmp_path / "again"), settings)
    assert made.digest == Corpus.open(released / "corpus").digest


def test_the_model_folder_draws_its_picture(released: Path) -> None:
    for path in (released / "model" / "encoders").glob("*.json"):
        facts = json.loads(path.read_text())
        facts["settings"]["model"] = str(released / "llms" / facts["name"])
        path.write_text(json.dumps(facts))
    pipe = LIDiTPipeline.from_pretrained(released / "model")
    torch.manual_seed(0)
    # after four steps every gate is next to closed, and the picture next to grey
    with torch.no_grad():
        for parameter in pipe.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    images = image_bytes(pipe(PROMPTS, seed=[0, 1], output_type="pt").images)
    with Image.open(RELEASED / "drawn.png") as image:
        drawn = np.asarray(image).astype(int)
    difference = np.abs(np.concatenate(list(images), axis=1).astype(int) - drawn)
    assert drawn.std() > 20
    assert difference.max() <= 1  # another kind of CPU may round the last bit otherwise


@pytest.mark.slow
def test_a_run_goes_on_to_the_model_it_had_become(
    ray_cluster: None, released: Path, tmp_path: Path
) -> None:
    shutil.copytree(released / "run", tmp_path / "runs" / "run")
    (tmp_path / "runs" / "run" / "mlflow-run").unlink()
    tree = json.loads((released / "run" / "recipe.json").read_text())
    tree |= {"output": str(tmp_path / "runs"), "corpus": str(released / "corpus")}
    for settings in tree["encoders"]:
        settings["model"] = str(released / "llms" / settings["name"])
    result = train(Recipe.model_validate(tree))
    assert (result.step, result.trained) == (4, True)
    losses = MlflowClient(result.tracking_uri).get_metric_history(result.run_id, "train/loss")
    assert sorted(point.step for point in losses) == [3, 4], "it did not go on from step 2"
    weights = Path("model") / "diffusion_pytorch_model.safetensors"
    now, then = load_file(result.model / weights), load_file(RELEASED / "model" / weights)
    assert now.keys() == then.keys()
    for name, tensor in then.items():
        torch.testing.assert_close(now[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
