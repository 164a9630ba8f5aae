"""Few captions without a cluster: the same bytes as with one, and one command from a file of
captions to Parquet.
"""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from lidit.config import EncoderSettings, IngestSettings
from lidit.sources.ingest import ingest
from lidit.store import Corpus
from lidit.text import PromptEncoder, resolve_encoder
from lidit.text.local import embed_here
from pipelines.corpus.embed import run_embed
from tests.helpers import embed_job
from tests.helpers.command import lidit
from tests.helpers.tiny_models import tiny_llm

CAPTIONS = ["a red circle", "a blue square left of a red circle", "a red circle", "a cat"]


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncoderSettings:
    monkeypatch.setenv("LIDIT_CACHE", str(tmp_path / "cache"))
    return EncoderSettings(name="tiny", model=str(tiny_llm(tmp_path / "llm", "llama", 4, 32)))


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


def files(folder: Path) -> dict[str, bytes]:
    """Content by name, without what says when and how fast a file was made."""
    return {
        path.name: path.read_bytes()
        for path in folder.rglob("*.arrow")
        if "MANIFEST" not in path.name
    }


@pytest.mark.slow
def test_the_bytes_are_those_of_the_cluster(
    ray_cluster: None, encoder: EncoderSettings, captions: Path, tmp_path: Path
) -> None:
    for name in ("here", "ray"):
        ingest(
            [str(captions)],
            str(tmp_path / name),
            IngestSettings(captions_only=True, unit_samples=2),
        )
    family = embed_here(str(tmp_path / "here"), encoder)
    made = run_embed(str(tmp_path / "ray"), encoder)
    assert family.fingerprint == made.fingerprint
    mine, theirs = (files(tmp_path / name / "text") for name in ("here", "ray"))
    assert len(mine) == 3
    assert mine == theirs


def test_a_caption_of_a_small_corpus_is_computed_once(
    encoder: EncoderSettings, captions: Path, tmp_path: Path
) -> None:
    for name in ("here", "plain"):
        ingest([str(captions)], str(tmp_path / name), IngestSettings(captions_only=True))
    read: list[int] = []

    def count(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(module, nn.Embedding):
            read.append(1)

    with register_module_forward_hook(count):
        family = embed_here(str(tmp_path / "here"), encoder)
        once = len(read)
        embed_job.embed_here(tmp_path / "plain", encoder)
    # Of both: the instruction, its trial and the empty caption; the captions' only batch.
    assert len(read) - once == once + 1
    assert files(Path(family.folder.location)) == files(tmp_path / "plain" / "text")


def test_an_interrupted_one_is_finished_and_a_finished_one_loads_no_model(
    encoder: EncoderSettings, captions: Path, tmp_path: Path
) -> None:
    ingest([str(captions)], str(tmp_path / "c"), IngestSettings(captions_only=True, unit_samples=1))
    family = embed_here(str(tmp_path / "c"), encoder)
    before = files(Path(family.folder.location))
    removed = next(path for path in Path(family.folder.location).glob("00001*.json"))
    removed.unlink()
    for manifest in Path(family.folder.location).glob("MANIFEST*"):
        manifest.unlink()
    counted: list[tuple[int, int]] = []

    class Counting:
        def expect(self, total: int, done: int = 0) -> None:
            counted.append((done, total))

        def update(self, done: int, note: str = "") -> None:
            counted.append((done, -1))

    again = embed_here(str(tmp_path / "c"), encoder, progress=Counting())
    assert files(Path(again.folder.location)) == before
    assert counted == [(3, 4), (4, -1)]
    counted.clear()
    embed_here(str(tmp_path / "c"), encoder, progress=Counting())
    assert counted == []


def test_one_command_from_captions_to_parquet(
    encoder: EncoderSettings, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "states.parquet"
    file.write_text(f"name: tiny\nmodel: {encoder.model}\nstorage: float32\n")
    assert lidit("embed", captions, "--encoder", file, "--out", out) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 4 captions, ")
    frame = pd.read_parquet(out)
    assert list(frame["caption"]) == CAPTIONS
    assert list(frame["key"]) == [f"captions.txt:{line}" for line in (1, 2, 3, 4)]
    loaded = PromptEncoder.load(resolve_encoder(encoder))
    for caption, states in zip(CAPTIONS, frame["tiny_states"], strict=True):
        found = torch.tensor([list(row) for row in states])
        torch.testing.assert_close(
            found, loaded.encode([caption])[0].states.float(), rtol=1e-4, atol=1e-4
        )
    assert (
        lidit("embed", captions, "layer=-2", "--encoder", file, "--out", tmp_path / "two.parquet")
        == 0
    )
    earlier = pd.read_parquet(tmp_path / "two.parquet")["tiny_states"].iloc[0]
    assert earlier[0][0] != frame["tiny_states"].iloc[0][0][0], "another layer has other states"
    capsys.readouterr()
    assert lidit("embed", captions, "--encoder", file, "--encoder", file, "--out", out) == 2
    assert "is of one LLM" in capsys.readouterr().err
    assert lidit("embed", captions, "--encoder", file, "--out", tmp_path / "states.csv") == 2
    assert "ends in .parquet" in capsys.readouterr().err


def test_a_dry_run_of_one_file_writes_nothing(
    encoder: EncoderSettings, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "states.parquet"
    file.write_text(f"name: tiny\nmodel: {encoder.model}\n")
    before = sorted(tmp_path.rglob("*"))
    assert lidit("embed", captions, "--encoder", file, "--out", out, "--dry-run") == 0
    assert capsys.readouterr().out == f"3 captions to compute into {out}, model {encoder.model}\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_says_what_is_left(
    encoder: EncoderSettings, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, file, recipe = tmp_path / "c", tmp_path / "tiny.yaml", tmp_path / "r.yaml"
    file.write_text(f"name: tiny\nmodel: {encoder.model}\n")
    recipe.write_text(
        f"name: r\ncorpus: {corpus}\noutput: {tmp_path}/runs\nencoders: [{{name: tiny, model: "
        f"{encoder.model}}}]\n"
    )
    assert lidit("run", recipe, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"ingest: to do, into {corpus}",
        "embed tiny: to do, after ingest",
    ]
    ingest([str(captions)], str(corpus), IngestSettings(captions_only=True, unit_samples=2))
    assert lidit("embed", corpus, "--encoder", file, "--dry-run") == 0
    assert "tiny: to do, 4 captions in 2 of 2 units, into text/tiny-" in capsys.readouterr().out
    assert not Corpus.open(corpus).text_families()
    embed_here(str(corpus), encoder)
    assert lidit("run", recipe, "--dry-run", "--until", "train") == 0
    ingested, embedded, latents, trained = capsys.readouterr().out.splitlines()
    assert ingested == "ingest: finished"
    assert embedded.startswith("embed tiny: finished, text/tiny-")
    assert latents.startswith("latents pixels: to do, 4 images in 2 of 2 units")
    assert trained.startswith("train: to do, ")
    assert not (corpus / "latents").exists()
