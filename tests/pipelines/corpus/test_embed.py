"""Embedding over Ray Data: right values, the same bytes however it is spread, nothing done twice,
nothing silent.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from lidit.config import EncoderSettings, PoolSettings
from lidit.errors import InputError
from lidit.store import Corpus
from lidit.text import PromptEncoder, resolve_encoder
from pipelines.corpus.embed import run_embed
from pipelines.corpus.encode_units import (
    TOKENIZED,
    EncodeJob,
    EncodeUnits,
    prepare,
    tokenize_units,
)
from pipelines.runtime import resources
from tests.helpers.embed_job import contents, encoder, make_job, start
from tests.helpers.tiny_models import break_weights, tiny_llm

ONE, TWO = (
    PoolSettings(actors=1, cpus=1, token_budget=256),
    PoolSettings(actors=2, cpus=1, token_budget=256),
)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, ray_cluster: None) -> Path:
    """A corpus embedded by one actor."""
    corpus = make_job(tmp_path_factory.mktemp("undisturbed") / "corpus")
    run_embed(str(corpus), encoder(model), ONE)
    return corpus


def test_stored_states_are_the_encoders(undisturbed: Path, model: Path) -> None:
    corpus = Corpus.open(undisturbed)
    family = corpus.text_family("tiny")
    direct = PromptEncoder.load(resolve_encoder(encoder(model), "cpu"), "cpu")
    shared = family.shared()
    everything = []
    for unit in range(corpus.num_units):
        captions = corpus.captions(unit)["text"].to_pylist()
        expected = direct.encode(captions)
        everything += [caption.states for caption in expected]
        assert family.token_ids(unit) == [list(caption.token_ids) for caption in expected]
        for states, caption in zip(family.read(unit), expected, strict=True):
            error = (states - caption.states) / shared.deviation
            assert error.square().mean().sqrt() < 0.02  # int8
    ids, prefix = direct.prefix_states()
    assert shared.prefix_ids == ids
    assert torch.allclose(shared.prefix, prefix)
    assert torch.allclose(shared.empty, direct.empty_states()[1])
    # fewer captions than a calibration sample takes: the statistics are those of all
    values = torch.cat(everything)
    assert torch.allclose(shared.mean, values.mean(0), atol=1e-4)
    assert torch.allclose(shared.deviation, values.std(0, correction=0), rtol=1e-4)


@pytest.mark.slow  # the fault tests hold the same of disturbed actors
def test_more_actors_write_the_same_bytes(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    corpus = make_job(tmp_path / "corpus")
    summary = run_embed(str(corpus), encoder(model), TWO)
    assert summary.computed_units == summary.units == 6
    assert contents(corpus) == contents(undisturbed)
    digests = {Corpus.open(path).text_family("tiny").digest for path in (corpus, undisturbed)}
    assert len(digests) == 1


def test_complete_rerun_loads_no_model_and_changes_nothing(undisturbed: Path, model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    process = start(undisturbed, encoder(model))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[-1]) == {"computed": 0, "ray": False, "modeling": []}
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_few_units_are_computed_without_ray(model: Path, tmp_path: Path, ray_cluster: None) -> None:
    alone, joined = make_job(tmp_path / "alone", units=2), make_job(tmp_path / "joined", units=2)
    process = start(alone, encoder(model))
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    told = json.loads(output.splitlines()[-1])
    assert (told["computed"], told["ray"]) == (2, False)
    # The session's Ray is this process's cluster.
    run_embed(str(joined), encoder(model), PoolSettings(actors=1, cpus=1))
    assert contents(alone) == contents(joined)


def test_a_changed_spec_is_a_new_family_and_says_what_differs(
    undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(undisturbed, corpus)
    changed = encoder(model, layer=-2, storage="bfloat16", max_tokens=6)
    summary = run_embed(str(corpus), changed, ONE)
    old = next(p.name for p in (undisturbed / "text").iterdir())
    assert summary.directory != old
    assert sorted(line.split(":")[0] for line in summary.relatives[old]) == [
        "blocks",
        "max_tokens",
        "storage",
    ]
    assert contents(undisturbed).items() <= contents(corpus).items()
    # cut captions are counted, in the summary and in the manifest
    direct = PromptEncoder.load(resolve_encoder(changed, "cpu"), "cpu")
    opened = Corpus.open(corpus)
    texts = [
        t for unit in range(opened.num_units) for t in opened.captions(unit)["text"].to_pylist()
    ]
    cut = sum(tokens.truncated for tokens in direct.tokenizer.tokenize(texts))
    assert summary.truncated == cut > 0
    manifest = opened.text_family(summary.directory).manifest
    assert manifest["counts"]["truncated"] == cut
    assert manifest["extra"]["encoder"]["max_tokens"] == 6
    assert 0 < manifest["storage_error"]["standardised_rms"] < 0.01


def test_what_is_wrong_with_a_model_reaches_the_user(tmp_path: Path, ray_cluster: None) -> None:
    folder = tiny_llm(tmp_path / "model", "llama")
    break_weights(folder)
    corpus = make_job(tmp_path / "corpus", units=2, rows=2)
    with pytest.raises(InputError, match="the weight files lack 1 tensors"):
        run_embed(str(corpus), encoder(folder), ONE)


def job_of(corpus: Path, settings: EncoderSettings) -> EncodeJob:
    """What the driver sends to every worker."""
    return EncodeJob(str(corpus), settings, resolve_encoder(settings, "cpu"), ONE)


def test_another_model_at_the_drivers_path_publishes_nothing(tmp_path: Path) -> None:
    """As on a node with a disk of its own, where an older fine-tune lies at the same path."""
    corpus, folder = make_job(tmp_path / "corpus", units=2, rows=2), tmp_path / "model"
    job = job_of(corpus, encoder(tiny_llm(folder, seed=1)))
    tiny_llm(folder, seed=2)
    told = (
        r"this node has other model files than .* \(weights_sha256: .*\); give all nodes the "
        r"same files"
    )
    with pytest.raises(InputError, match=told):
        job.load()
    assert re.search(told, prepare(job)["problem"]["text"])
    (tokenized,) = tokenize_units(pa.table({"unit": [0]}), job).to_pylist()
    assert tokenized["problem"]["input"]
    assert re.search(told, tokenized["problem"]["text"])
    (encoded,) = EncodeUnits(job)(
        pa.Table.from_pylist([{**tokenized, "problem": None}], TOKENIZED)
    ).to_pylist()
    assert re.search(told, encoded["problem"]["text"])
    assert not list(corpus.glob("text/*/*.arrow"))


def test_a_workers_files_are_looked_at_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, looked = job_of(make_job(tmp_path / "corpus", units=3, rows=2), encoder(model)), []
    monkeypatch.setattr(
        "pipelines.corpus.encode_units.resolve_encoder",
        lambda *asked: looked.append(asked) or resolve_encoder(*asked),
    )
    assert not any(
        row["problem"] for row in tokenize_units(pa.table({"unit": [0, 1, 2]}), job).to_pylist()
    )
    job.load()
    assert len(looked) == 1


def test_a_workers_own_folder_does_not_matter(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    job = job_of(tmp_path / "corpus", encoder(Path(model.name)))
    monkeypatch.chdir(tmp_path)
    assert job.local_spec() == job.spec


def test_a_model_may_lie_elsewhere_on_a_node(tmp_path: Path, model: Path) -> None:
    job = job_of(tmp_path / "corpus", encoder(model))
    moved = replace(job, spec=replace(job.spec, folder=str(tmp_path / "on-the-driver")))
    assert moved.local_spec() == job.spec


def test_what_this_machine_does_not_have_is_refused(
    tmp_path: Path, model: Path, ray_cluster: None
) -> None:
    corpus = make_job(tmp_path / "corpus", units=2, rows=2)
    with pytest.raises(InputError, match="1 actors ask for 1 GPU, this machine offers 0"):
        run_embed(str(corpus), encoder(model), PoolSettings(actors=1, gpus=1))
    with pytest.raises(InputError, match="ask for 900 CPU"):
        run_embed(str(corpus), encoder(model), PoolSettings(actors=9, cpus=100))


@pytest.mark.slow
def test_actors_that_hold_every_cpu_still_get_tokens(
    tmp_path: Path, model: Path, ray_cluster: None
) -> None:
    corpus = make_job(tmp_path / "corpus", units=3, rows=2)
    all_of_them = PoolSettings(cpus=resources.total("CPU"))
    assert run_embed(str(corpus), encoder(model), all_of_them).computed_units == 3


def test_not_a_corpus_is_said_before_a_model_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a corpus"):
        run_embed(str(tmp_path), encoder(tmp_path / "no-model"), ONE)


def test_non_finite_states_are_refused(tmp_path: Path) -> None:
    folder = tiny_llm(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    corpus = make_job(tmp_path / "corpus", units=2, rows=2)
    job = job_of(corpus, encoder(folder))
    (encoded,) = EncodeUnits(job)(tokenize_units(pa.table({"unit": [0]}), job)).to_pylist()
    for problem in (prepare(job)["problem"], encoded["problem"]):
        assert re.search(r"not finite|NaN or infinite", problem["text"])
        assert not problem["input"]
    assert not list(corpus.glob("text/*/*.arrow"))
