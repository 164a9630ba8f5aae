"""`lidit run` on a real LLM and a tiny one: a recipe from sources to scores, encoders side by side;
every command finds what it left; killed anywhere, the same command ends it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lidit.config.shipped import load_encoder_settings, load_recipe
from lidit.errors import InputError
from lidit.pipeline import LIDiTPipeline
from lidit.store import Corpus
from lidit.text import packaged_model_folder
from pipelines.chain import run_chain
from tests.helpers.command import lidit
from tests.helpers.tiny_models import tiny_llm
from tests.helpers.waiting import wait_until

RECIPE = """
name: chain
output: runs
corpus: corpus
sources: [{folder}/scenes]
ingest: {{resolution: 32, bucket_multiple: 8, unit_samples: 20}}
encoders:
  - {{name: tiny, model: {folder}/tiny, storage: int8}}
  - {real}
model: {{width: 32, depth: 1, heads: 2, patch_size: 8, refiner: {{depth: 1}}}}
objective: {{kind: clean, timesteps: uniform}}
train: {{steps: 4, batch_size: 12, checkpoint_every: 2, log_every: 2, sample_every: 2, sample_prompts: [a red circle]}}
engine: {{workers: 2, zero_stage: 2}}
sampler: {{steps: 2}}
evaluate: {{per_tag: 1, tags: [single_object]}}
"""  # noqa: E501
WEIGHTS = "runs/chain/model/model/diffusion_pytorch_model.safetensors"
SCENES = ("scenes", "--count", "60", "--seed", "2")


@pytest.fixture(scope="module")
def real() -> bool:
    """Whether the real LLM can be installed here."""
    try:
        packaged_model_folder("smollm2")
    except InputError:
        return False
    return True


@pytest.fixture
def _real(real: bool) -> None:
    if not real:
        pytest.skip("the real LLM cannot be installed here")


@pytest.fixture(scope="module")
def inputs(real: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, a tiny LLM, another in the real one's place where that is not to be had, and a
    recipe.
    """
    folder = tmp_path_factory.mktemp("inputs")
    assert lidit(*SCENES, "--out", folder / "scenes") == 0
    tiny_llm(folder / "tiny", "gemma3")
    if not real:
        tiny_llm(folder / "llama", "llama")
    encoder = "smollm2" if real else f"{{name: smollm2, model: {folder}/llama}}"
    (folder / "chain.yaml").write_text(RECIPE.format(folder=folder, real=encoder))
    return folder


@pytest.fixture(scope="module")
def finished(ray_cluster: None, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert lidit("run", inputs / "chain.yaml") == 0
    return folder


def digests(folder: Path) -> list[object]:
    corpus = Corpus.open(folder / "corpus")
    texts = [corpus.text_family(name).digest for name in ("tiny", "smollm2")]
    return [
        corpus.digest,
        *texts,
        corpus.latent_family("pixels").digest,
        (folder / WEIGHTS).read_bytes(),
    ]


def test_one_command_makes_everything(finished: Path) -> None:
    corpus = Corpus.open(finished / "corpus")
    assert corpus.num_samples == 60
    assert {family.name for family in corpus.text_families()} == {"smollm2", "tiny"}
    assert len(digests(finished)) == 5
    scores = json.loads((finished / "runs/chain/evaluation/scores.json").read_text())
    assert 0 <= scores["metrics"]["overall/strict"] <= scores["metrics"]["overall/lax"] <= 1
    assert "floor lax" in scores["table"]
    for picture in ("evaluation/grid.png", "samples/step-000000004.png"):
        assert Image.open(finished / "runs/chain" / picture).width >= 32


def test_encoders_ran_side_by_side(finished: Path) -> None:
    first, second = sorted((finished / "corpus" / "text").iterdir())
    for begun, other in ((first, second), (second, first)):
        assert (begun / "family.json").stat().st_mtime_ns < (
            other / "MANIFEST.json"
        ).stat().st_mtime_ns


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


@pytest.mark.usefixtures("_real")
def test_the_real_llm_is_the_pinned_one(finished: Path) -> None:
    spec = Corpus.open(finished / "corpus").text_family("smollm2").spec
    assert (spec["width"], spec["blocks"], spec["total_blocks"]) == (576, 28, 30)
    assert spec["instruction"].startswith("Describe the image by detailing the color, shape")
    assert load_encoder_settings("smollm2").chat_template


def test_the_model_draws_and_the_corpus_is_shown(finished: Path, tmp_path: Path) -> None:
    prompts = ("--prompt", "a red circle", "--prompt", "a blue square")
    assert lidit("sample", finished / "runs/chain/model", *prompts, "--out", tmp_path) == 0
    assert len(list(tmp_path.glob("00?-000?.png"))) == 8
    assert Image.open(tmp_path / "grid.png").width > 100
    assert lidit("inspect", finished / "corpus") == 0


def test_every_command_finds_what_the_run_left(
    finished: Path,
    inputs: Path,
    real: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished)
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")}
    sizes = ("resolution=32", "bucket_multiple=8", "unit_samples=20")
    Path("tiny.yaml").write_text(f"{{name: tiny, model: {inputs}/tiny, storage: int8}}")
    for words in (
        [*SCENES, "--out", inputs / "scenes"],
        [
            "ingest",
            inputs / "scenes",
            "--corpus",
            "corpus",
            *(word for size in sizes for word in ("--set", size)),
        ],
        [
            "embed",
            "corpus",
            "--encoder",
            "./tiny.yaml",
            *(("--encoder", "smollm2") if real else ()),
        ],
        ["latents", "corpus", "--codec", "pixels"],
        ["train", inputs / "chain.yaml"],
        ["evaluate", "runs/chain/model", "per_tag=1", "tags=[single_object]"],
    ):
        assert lidit(*words) == 0, words
        assert "already" in capsys.readouterr().out, words
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")}


def test_again_nothing_is_started(finished: Path, inputs: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")}
    # A cluster that is not there: whoever tried to join it would fail.
    done = start(finished, inputs, RAY_ADDRESS="127.0.0.1:9")
    output, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert output.count("already") == 6, output
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")}


def test_mistakes_of_late_stages_are_found_first(
    finished: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for override, message in (
        ("encoders.0.layer=9", "has 6 blocks"),
        ("encoders.0.model=/absent", "/absent"),
        ("codec={name: vae, model: /absent}", "/absent"),
        ("pools={tny: {actors: 2}}", "no encoder is called 'tny'"),
        ("sources=[/absent]", "/absent"),
    ):
        assert lidit("run", inputs / "chain.yaml", override) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()
    assert lidit("run", inputs / "chain.yaml", "sources=[]") == 2
    assert "lidit ingest" in capsys.readouterr().err


def test_until_stops_there(
    ray_cluster: None, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lidit("run", inputs / "chain.yaml", "--until", "ingest") == 0
    assert (tmp_path / "corpus" / "corpus.json").is_file()
    assert not (tmp_path / "corpus" / "text").exists()
    assert lidit("run", inputs / "chain.yaml", "--until", "nowhere") == 2


def needed_cpus(actors: int) -> int:
    """The actors and the reader of either encoder, and two CPUs to spare."""
    return (actors + 1) + (1 + 1) + 2


def test_the_first_stage_asks_for_a_ray_that_every_stage_fits_into(
    ray_cluster: None,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The Ray of the tests is there already, and smaller: the warning names what the
    job asks for.
    """
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(inputs / "chain.yaml"), ["pools={tiny: {actors: 9}}"])
    run_chain(recipe, lambda stage, summary: None, until="ingest")
    assert f"this job asks for {needed_cpus(9)} and may wait" in caplog.text


@pytest.mark.slow  # the same number, of a Ray that the chain starts
def test_the_first_stage_starts_a_ray_that_every_stage_fits_into(
    inputs: Path, tmp_path: Path
) -> None:
    actors = (os.cpu_count() or 1) + 3
    program = f"""
import ray
from lidit.config.shipped import load_recipe
from pipelines.chain import run_chain
recipe = load_recipe({str(inputs / "chain.yaml")!r}, ["pools={{tiny: {{actors: {actors}}}}}"])
run_chain(recipe, lambda stage, summary: None, until="ingest")
print(ray.cluster_resources()["CPU"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert float(done.stdout) == needed_cpus(actors)


# -- kills -----------------------------------------------------------------------------------------


def start(folder: Path, inputs: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [Path(sys.executable).with_name("lidit"), "run", inputs / "chain.yaml"],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_in_every_stage_it_ends_the_same(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    """kill -9 of the driver and all that hangs on it, once in each stage, always the same command
    again.
    """
    begun = (
        "corpus/ingest/plan.json",
        "corpus/text/*/family.json",
        "corpus/text/*/0*.json",
        "corpus/latents/*/family.json",
        "runs/chain/run.json",
        "runs/chain/step-*2/position.json",
        "runs/chain/model/finished.json",
    )
    for pattern in begun:
        if list(tmp_path.glob(pattern)):
            continue  # the run before got further than it was to
        process = start(tmp_path, inputs)
        wait_until(
            lambda wanted=pattern: list(tmp_path.glob(wanted)),  # type: ignore[misc]
            240,
            lambda driver=process: None if driver.poll() is None else str(driver.communicate()),  # type: ignore[misc]
            every=0.005,
        )
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "runs/chain/evaluation/scores.json").exists()
    process = start(tmp_path, inputs)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert digests(tmp_path) == digests(finished)
