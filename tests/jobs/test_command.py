"""What users try first gets a clear answer: one line, the right exit code, no traceback."""

import contextlib
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from command import lidit

JOBS = ("demo", "run", "scenes", "ingest", "embed", "latents", "train", "sample", "evaluate", "inspect", "verify",
        "repair", "export")  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_help_says_what_is_read_and_written(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert lidit(job, "--help") == 0
    text = capsys.readouterr().out
    assert "Writes" in text
    assert "Example:" in text
    assert f"lidit {job}" in text


def test_help_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert lidit("--help") == 0
    text = capsys.readouterr().out
    assert all(f"│ {job} " in text for job in JOBS)


def fails(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert lidit(*words) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    return lines[0]


def test_first_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\ncorpus: nowhere\nencoders: [smollm2]\ntrian: {steps: 3}\n")
    assert "did you mean 'train'" in fails(capsys, "train", recipe)
    recipe.write_text("name: r\ncorpus: nowhere\nencoders: [smollm2]\n")
    assert "nowhere" in fails(capsys, "train", recipe)
    (tmp_path / "empty").mkdir()
    assert "not a corpus" in fails(capsys, "inspect", tmp_path / "empty")
    assert "not a corpus" in fails(capsys, "embed", tmp_path / "empty", "--encoder", "smollm2")
    assert "smollm2" in fails(capsys, "embed", tmp_path / "empty", "--encoder", "smolm")
    assert "no such model folder" in fails(capsys, "sample", tmp_path / "absent", "--prompt", "x")
    assert "model_index.json" in fails(capsys, "evaluate", tmp_path / "empty")
    assert "per_tag" in fails(capsys, "evaluate", tmp_path / "empty", "per_tags=3")
    assert str(tmp_path / "empty") in fails(capsys, "ingest", tmp_path / "empty", "--corpus", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_tar_cut_in_half_keeps_what_is_whole(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lidit.store import Corpus

    assert lidit("scenes", "--out", tmp_path / "s", "--count", "40", "--seed", "1") == 0
    tar = next((tmp_path / "s").glob("*.tar"))
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    with tarfile.open(fileobj=tar.open("rb")) as half:
        names = {name.split(".")[0] for name in _members(half)}
    capsys.readouterr()
    assert lidit("ingest", tmp_path / "s", "--corpus", tmp_path / "c", "--set", "resolution=32") == 0
    text = capsys.readouterr().out
    corpus = Corpus.open(tmp_path / "c")
    assert 0 < corpus.num_samples < 40
    assert corpus.num_samples >= len(names) - 1
    assert "refused" in text


def _members(tar: tarfile.TarFile) -> list[str]:
    found = []
    with contextlib.suppress(tarfile.TarError):
        found.extend(member.name for member in tar)
    return found


def test_it_runs_outside_the_repository(tmp_path: Path) -> None:
    import subprocess

    command = shutil.which("lidit", path=str(Path(sys.executable).parent))
    assert command
    done = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "evaluate" in done.stdout
