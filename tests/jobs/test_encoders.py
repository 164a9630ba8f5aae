"""`lidit encoders`: every shipped encoder with what a token of it costs."""

import json
from pathlib import Path

import pytest

from lidit.config.shipped import ENCODERS
from tests.helpers.command import lidit
from tests.helpers.corpus_factory import make_corpus


def test_every_shipped_encoder_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert lidit("encoders", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {path.stem for path in ENCODERS.glob("*.yaml")}
    flux = rows["flux2-klein"]
    assert (flux["layers"], flux["width"], flux["bytes"]) == (
        [9, 18, 27],
        3 * 2560,
        2 * 3 * 2560 + 4,
    )
    assert (rows["smollm2"]["layers"], rows["smollm2"]["width"], rows["smollm2"]["join"]) == (
        [28],
        576,
        "one",
    )
    assert len(rows["ltx2"]["layers"]) == 49
    assert rows["hidream-llama"]["width"] == 32 * 4096
    assert rows["clip-l"]["pooled"] == "pooler_output"
    assert all(row["licence"] and row["system"] for row in rows.values())
    assert lidit("encoders") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 3
    assert lines[-1].startswith("left out, with the reason when asked for: anima, ")
    line = next(line for line in lines if line.startswith("z-image "))
    assert line.split()[1:3] == ["Z-Image", "2560"]
    # two files of one family each, named after the system too
    assert rows["lidit-llama3"]["bytes"] == 4096 + 8


def test_a_model_of_the_hub_needs_its_commit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_corpus(tmp_path / "corpus", [["a"]])
    assert lidit("embed", tmp_path / "corpus", "--encoder", "qwen-image") == 2
    message = capsys.readouterr().err
    assert "Qwen/Qwen2.5-VL-7B-Instruct" in message
    assert "lidit embed revision=... or model=./folder" in message
