"""`lidit run`: a recipe from sources to scores, encoders side by side; killed anywhere, the same command ends it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lidit.errors import InputError, JobError
from lidit.store import Corpus
from pipelines.chain import side_by_side
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
  - {{name: llama, model: {folder}/llama}}
  - {{name: qwen2, model: {folder}/qwen2, storage: int8}}
model: {{width: 32, depth: 1, heads: 2, patch_size: 8, refiner: {{depth: 1}}}}
objective: {{kind: clean, timesteps: uniform}}
train: {{steps: 4, batch_size: 12, checkpoint_every: 2, log_every: 2}}
sampler: {{steps: 2}}
evaluate: {{per_tag: 1, tags: [single_object]}}
"""
WEIGHTS = "runs/chain/model/model/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, two tiny LLMs and a recipe."""
    folder = tmp_path_factory.mktemp("inputs")
    assert lidit("scenes", "--out", folder / "scenes", "--count", "60", "--seed", "2") == 0
    for family in ("llama", "qwen2"):
        tiny_llm(folder / family, family)
    (folder / "chain.yaml").write_text(RECIPE.format(folder=folder))
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
    texts = [corpus.text_family(name).digest for name in ("llama", "qwen2")]
    return [corpus.digest, *texts, corpus.latent_family("pixels").digest, (folder / WEIGHTS).read_bytes()]


def test_one_command_makes_everything(finished: Path) -> None:
    assert (finished / "runs/chain/evaluation/scores.json").is_file()
    assert Corpus.open(finished / "corpus").num_samples == 60
    assert len(digests(finished)) == 5


def test_encoders_ran_side_by_side(finished: Path) -> None:
    first, second = sorted((finished / "corpus" / "text").iterdir())
    for begun, other in ((first, second), (second, first)):
        assert (begun / "family.json").stat().st_mtime_ns < (other / "MANIFEST.json").stat().st_mtime_ns


def test_again_nothing_is_started(finished: Path, inputs: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")}
    # A cluster that is not there: whoever tried to join it would fail.
    done = start(finished, inputs, RAY_ADDRESS="127.0.0.1:9")
    output, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert output.count("already") == 6, output
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*.arrow")}


def test_mistakes_of_late_stages_are_found_first(
    finished: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for override, message in (
        ("encoders.1.layer=9", "has 6 blocks"),
        ("encoders.0.model=/absent", "/absent"),
        ("codec={name: vae, model: /absent}", "/absent"),
        ("pools={llma: {actors: 2}}", "no encoder is called 'llma'"),
        ("sources=[/absent]", "/absent"),
    ):
        assert lidit("run", inputs / "chain.yaml", override) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()
    assert lidit("run", inputs / "chain.yaml", "sources=[]") == 2
    assert "lidit ingest" in capsys.readouterr().err


def test_until_stops_there(
    ray_cluster: None, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lidit("run", inputs / "chain.yaml", "--until", "ingest") == 0
    assert (tmp_path / "corpus" / "corpus.json").is_file()
    assert not (tmp_path / "corpus" / "text").exists()
    assert lidit("run", inputs / "chain.yaml", "--until", "nowhere") == 2


def test_the_first_stage_starts_a_ray_that_every_stage_fits_into(inputs: Path, tmp_path: Path) -> None:
    actors = (os.cpu_count() or 1) + 3
    program = f"""
import ray
from lidit.config.shipped import load_recipe
from pipelines.chain import run_chain
recipe = load_recipe({str(inputs / "chain.yaml")!r}, ["pools={{llama: {{actors: {actors}}}}}"])
run_chain(recipe, lambda stage, summary: None, until="ingest")
print(ray.cluster_resources()["CPU"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    )
    # The actors and the reader of either encoder, and two CPUs to spare.
    assert float(done.stdout) == (actors + 1) + (1 + 1) + 2


# -- side by side, without a cluster ----------------------------------------------------------------------------------


def test_what_fits_runs_together_and_what_does_not_waits() -> None:
    together, alone = threading.Barrier(2, timeout=20), threading.Lock()
    overlaps: list[str] = []

    def small() -> str:
        together.wait()  # breaks unless the other small one runs now
        return "small"

    def large() -> str:
        if not alone.acquire(blocking=False):
            overlaps.append("large")
        time.sleep(0.05)  # hold the lock: another one that were started beside this one must meet it taken
        alone.release()
        return "large"

    results: list[str] = []
    calls = {"a": small, "b": small, "c": large, "d": large, "too large": lambda: "huge"}
    demands = {"a": {"CPU": 2}, "b": {"CPU": 2, "GPU": 0}, "c": {"CPU": 3}, "d": {"CPU": 3}, "too large": {"CPU": 99}}
    side_by_side(calls, demands, {"CPU": 4}, results.append)
    assert sorted(results) == ["huge", "large", "large", "small", "small"]
    assert not overlaps


def test_a_failure_leaves_the_others_alone() -> None:
    failed = threading.Event()

    def bad() -> str:
        failed.set()
        raise JobError("the disk is full")

    def good() -> str:
        assert failed.wait(20)
        time.sleep(0.2)  # end after the failure has been told: that thread is the scheduler's own and gives no event
        return "good"

    results: list[str] = []
    with pytest.raises(JobError, match="disk is full"):
        side_by_side({"bad": bad, "good": good, "late": good}, {n: {"CPU": 1} for n in ("bad", "good", "late")},
                     {"CPU": 2}, results.append)  # fmt: skip
    assert results == ["good", "good"]
    with pytest.raises(InputError):
        side_by_side({"a": _refuse}, {"a": {}}, {}, results.append)


def _refuse() -> None:
    raise InputError("no")


# -- kills ------------------------------------------------------------------------------------------------------------


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
def test_killed_in_every_stage_it_ends_the_same(finished: Path, inputs: Path, tmp_path: Path) -> None:
    """kill -9 of the driver and all that hangs on it, once in each stage, always the same command again."""
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
