"""A model folder's files are those that were saved: one flipped bit anywhere is found before
anything is drawn.
"""

import json
import shutil
from pathlib import Path

import pytest

from jobs import verify
from lidit.errors import InputError, JobError
from lidit.pipeline import LIDiTPipeline
from lidit.pipeline.checksums import CHECKSUMS, check_model, write_checksums

RELEASED = Path(__file__).parents[1] / "fixtures" / "first_release" / "model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(RELEASED, tmp_path / "model"))
    write_checksums(folder)
    return folder


def test_a_saved_model_carries_its_checksums(tmp_path: Path) -> None:
    assert check_model(RELEASED) is None, (
        "folders of the first release have none and load all the same"
    )
    LIDiTPipeline.from_pretrained(RELEASED).save_pretrained(tmp_path / "saved")
    listed = json.loads((tmp_path / "saved" / CHECKSUMS).read_text())
    assert {
        "model_index.json",
        "model/diffusion_pytorch_model.safetensors",
        "encoders/llama.json",
    } <= listed.keys()
    assert check_model(tmp_path / "saved") == len(listed) == 7


def test_a_flipped_bit_in_any_file_is_found(model: Path) -> None:
    names = json.loads((model / CHECKSUMS).read_text())
    for name in names:
        content = (model / name).read_bytes()
        place = len(content) - 3
        (model / name).write_bytes(
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )
        with pytest.raises(InputError, match=rf"{name}: damaged, .* copy the model folder again"):
            LIDiTPipeline.from_pretrained(model)
        (model / name).write_bytes(content)
    assert LIDiTPipeline.from_pretrained(model).config.height == 32


def test_missing_and_foreign_files_are_found(model: Path) -> None:
    (model / "finished.json").write_text('{"step": 5}')
    (model / ".cache").mkdir()
    (model / ".cache" / "download.json").write_text("{}")
    assert check_model(model) == 7
    (model / "model" / "other.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"other\.safetensors: was not saved with the model"):
        check_model(model)
    (model / "model" / "other.safetensors").unlink()
    (model / "encoders" / "qwen2.json").unlink()
    with pytest.raises(InputError, match=r"qwen2.json: missing"):
        check_model(model)


def test_the_check_can_be_left_out(model: Path) -> None:
    (model / "encoders" / "llama.json").write_text(
        (model / "encoders" / "llama.json").read_text() + "\n"
    )
    with pytest.raises(InputError, match="damaged"):
        LIDiTPipeline.from_pretrained(model)
    assert LIDiTPipeline.from_pretrained(model, check_files=False).config.height == 32


@pytest.mark.parametrize("content", ["[", "[]", "null", '{"a": 1}', "[" * 100_000])
def test_a_torn_list_is_one_line(model: Path, content: str) -> None:
    (model / CHECKSUMS).write_text(content)
    with pytest.raises(InputError, match=rf"{CHECKSUMS}: (cannot be read|holds no)"):
        check_model(model)


# What a full disk, a torn copy or a hostile hand leaves in a JSON file: each is one line, and no
# name on the hub.
TORN = {
    "brackets": b"[" * 3000,
    "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "empty": b"",
    "list": b"[1]",
    "null": b"null",
    "name": b'"x"',
    "number": b"3",
    "binary": b"\xff\xfe\x00",
    "nothing": b"{}",
}


@pytest.mark.parametrize("name", ["model_index.json", "model/config.json", "encoders/llama.json"])
def test_a_torn_settings_file_is_one_line(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(RELEASED, tmp_path / "model"))
    whole = (folder / name).read_bytes()
    for kind, content in {**TORN, "cut": whole[: len(whole) // 2]}.items():
        (folder / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            LIDiTPipeline.from_pretrained(folder)
        assert "\n" not in str(caught.value), kind
        assert len(str(caught.value)) < 600, kind
    (folder / name).write_bytes(whole)
    LIDiTPipeline.from_pretrained(folder)


def test_verify_takes_a_model_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify.command(str(model), False, False, 0)
    assert capsys.readouterr().out == f"{model}: sound, 7 files\n"
    weights = model / "model" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(JobError, match="damaged"):
        verify.command(str(model), False, False, 0)
    (model / CHECKSUMS).unlink()
    verify.command(str(model), False, False, 0)
    assert "without checksums" in capsys.readouterr().out
