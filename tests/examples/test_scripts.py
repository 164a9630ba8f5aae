"""Every script in examples/ runs on a small corpus and does what its first line says."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lidit import LIDiT, load_encoder
from tests.helpers.random_model import write_model
from tests.helpers.tiny_models import tiny_llm
from tests.helpers.trained import SmallWorld

EXAMPLES = Path(__file__).parents[2] / "examples"
Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a script with arguments as Python would; gives the lines it prints."""

    def script(name: str, *arguments: object) -> list[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return script


def test_every_script_is_run_here() -> None:
    tested = Path(__file__).read_text()
    scripts = [path.name for path in EXAMPLES.glob("*.py")]
    assert len(scripts) == 4
    assert [name for name in scripts if not re.search(rf'run\(\s*"{name}"', tested)] == []


def test_encode_captions(run: Run, tmp_path: Path) -> None:
    settings = {"name": "tiny", "model": str(tiny_llm(tmp_path / "llm")), "layer": -2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    captions = ["a red circle", "a blue square left of a star"]
    lines = run(
        "encode_captions.py",
        *captions,
        "--encoder",
        tmp_path / "tiny.yaml",
        "--out",
        tmp_path / "out",
    )
    assert lines[0] == "llama: block 5 of 6, width 64, float32"
    assert [line.partition(": ")[2] for line in lines[2:]] == captions
    written = load_file(tmp_path / "out" / "states.safetensors")
    expected = load_encoder(tmp_path / "tiny.yaml", "cpu").encode(captions)
    for number, caption in enumerate(expected):
        torch.testing.assert_close(written[str(number)], caption.states)


def test_read_a_corpus(run: Run, small_world: SmallWorld) -> None:
    lines = run("read_a_corpus.py", small_world.corpus)
    corpus = small_world.open()
    assert lines[0].endswith(f"97 samples in {corpus.num_units} units")
    sample = corpus.samples(0).to_pylist()[0]
    row = sample["captions"][0]["index"]
    shape = list(corpus.text_family("qwen2").read(0, [row])[0].shape)
    printed = "\n".join(lines)
    assert f"sample {sample['key']}, 32 x 32 pixels" in printed
    assert corpus.captions(0)["text"][row].as_py() in printed
    assert f"qwen2: states {shape}, int8 on disk" in printed
    assert "pixels: latents [3, 32, 32]" in printed


def test_own_training_loop(run: Run, small_world: SmallWorld, tmp_path: Path) -> None:
    arguments = (
        "--steps",
        25,
        "--batch-size",
        12,
        "--patch-size",
        8,
        "--out",
        tmp_path / "weights",
    )
    lines = run("own_training_loop.py", small_world.corpus, *arguments)
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(losses) == 4  # steps 0, 10, 20 and 24
    assert losses[-1] < 0.9 * losses[0]
    model = LIDiT.load(tmp_path / "weights")
    assert set(model.conditioner.names) == {"llama", "qwen2"}


def test_sample(run: Run, small_world: SmallWorld, tmp_path: Path) -> None:
    model = write_model(small_world, tmp_path, seed=0)
    options = ("--scales", 1, 3, "--seeds", 0, 1, 2, "--out", tmp_path / "grid.png")
    lines = run("sample.py", model, "a red circle", *options)
    assert lines[-1].endswith("6 images of 'a red circle'")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 32
        assert grid.height > 2 * 32
