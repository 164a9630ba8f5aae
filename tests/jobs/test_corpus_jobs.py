"""`lidit verify`, `repair`, `export`, `inspect`: a damaged corpus is named, mended and read by
others.
"""

import json
import re
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.command import lidit
from tests.helpers.embed_job import contents, embed_here, encoder, make_job
from tests.helpers.tiny_models import tiny_llm
from tests.helpers.trained import SmallWorld


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def corpus(tmp_path: Path, model: Path) -> Path:
    made = make_job(tmp_path / "corpus", units=4, rows=6)
    embed_here(made, encoder(model))
    return made


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify_repair_embed_verify(
    corpus: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lidit("verify", corpus) == 0
    assert "sound" in capsys.readouterr().out
    before = contents(corpus)
    damaged, lost = (
        next(corpus.glob("text/*/00001-*.arrow")),
        next(corpus.glob("text/*/00002-*.arrow")),
    )
    flip(damaged)
    lost.unlink()
    assert lidit("verify", corpus) == 1
    told = capsys.readouterr()
    assert f"{damaged}: damaged" in told.out
    assert f"{lost}: missing" in told.out
    assert f"lidit repair {corpus}" in told.err
    assert "Traceback" not in told.err
    assert lidit("repair", corpus) == 0
    told = capsys.readouterr()
    assert f"removed {damaged}" in told.out
    assert "now run: lidit embed" in told.out
    assert embed_here(corpus, encoder(model)) == [1, 2]
    assert contents(corpus) == before
    assert lidit("verify", corpus, "--deep") == 0
    assert lidit("repair", corpus) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_what_cannot_be_computed_again_is_left_and_said(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = corpus / "captions" / "00000.arrow"
    flip(captions)
    damaged = captions.read_bytes()
    assert lidit("repair", corpus) == 1
    assert "ingest the same sources" in capsys.readouterr().err
    assert captions.read_bytes() == damaged


def test_rows_computed_again_by_the_familys_own_encoder(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lidit("verify", small_world.corpus, "--encode", "5") == 0
    assert "10 rows computed again" in capsys.readouterr().out
    # Another model in the folder the family came from is seen before a row is compared.
    copy = tmp_path / "corpus"
    shutil.copytree(small_world.corpus, copy)
    moved = Path(small_world.encoders[0].model)
    aside = moved.rename(moved.with_suffix(".aside"))
    try:
        tiny_llm(moved, "llama", seed=9)
        assert lidit("verify", copy, "--encode", "5") == 2
        assert "weights_sha256" in capsys.readouterr().err
    finally:
        shutil.rmtree(moved)
        aside.rename(moved)


def test_export_and_inspect_of_a_real_corpus(
    small_world: SmallWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = small_world.corpus
    assert (
        lidit("export", corpus, "--to", "parquet", "--out", tmp_path / "p", "--family", "llama")
        == 0
    )
    table = pq.read_table(tmp_path / "p")
    assert len(set(table["key"].to_pylist())) == 97
    assert lidit("export", corpus, "--to", "webdataset", "--out", tmp_path / "w", "--images") == 0
    with tarfile.open(tmp_path / "w" / "00000.tar") as archive:
        names = archive.getnames()
        image = archive.extractfile(next(name for name in names if name.endswith(".image")))
        assert Image.open(image).size == (32, 32)
        facts = json.load(
            archive.extractfile(next(name for name in names if name.endswith(".json")))
        )
        assert facts["captions"]
    assert (
        lidit("export", corpus, "--to", "parquet", "--out", tmp_path / "q", "--family", "absent")
        == 2
    )
    assert lidit("export", corpus, "--to", "zip", "--out", tmp_path / "z") == 2
    capsys.readouterr()
    assert lidit("inspect", corpus, "--plots", tmp_path / "plots") == 0
    text = capsys.readouterr().out
    assert re.search(r"samples +97\b", text)
    for part in ("32x32 97", "llama-", "qwen2-", "pixels-", "int8", "buckets.png"):
        assert part in text, part
    assert "…" not in text
    for family in (*(corpus / "text").iterdir(), *(corpus / "latents").iterdir()):
        assert f"{family.parent.name}/{family.name}" in text, "the name is cut"
    assert len(list((tmp_path / "plots").glob("*.png"))) == 5
    assert all(Image.open(path).width > 300 for path in (tmp_path / "plots").glob("*.png"))
