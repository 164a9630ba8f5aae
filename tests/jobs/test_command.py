"""What users try first gets a clear answer: one line, the right exit code, no traceback."""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from ray.exceptions import RayTaskError

from jobs.main import app
from jobs.support.start import guarded
from lidit import __version__
from lidit.errors import StorageError
from tests.helpers.command import lidit

JOBS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
JobRaising = Callable[[BaseException], typer.Typer]
Ends = Callable[[BaseException], tuple[int, str]]


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
    assert str(tmp_path / "empty") in fails(
        capsys, "ingest", tmp_path / "empty", "--corpus", tmp_path / "c"
    )
    assert not (tmp_path / "c").exists()


def test_words_the_command_line_does_not_know_are_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = fails(capsys, "run", "demo", "--until", "trin")
    assert "lidit run: Invalid value for '--until': 'trin' is not one of 'ingest', 'embed'" in told
    assert told.endswith("lidit run --help)")
    assert "'json' is not one of" in fails(capsys, "export", "c", "--to", "json", "--out", "o")
    assert "Missing option '--corpus'" in fails(capsys, "ingest", "a")
    assert "give an LLM with --encoder, or a recipe with --rolling" in fails(capsys, "embed", "c")
    told = fails(capsys, "embed", "c", "--rolling", "demo", "--actors", "2")
    assert "--rolling takes its pools from the recipe: give pool.actors=2" in told
    told = fails(capsys, "plan", "demo", "online.keep=2")
    assert "online.keep" in told
    assert "did you mean 'embed'" in fails(capsys, "embd", "c").lower()
    assert lidit() == 2
    captured = capsys.readouterr()
    assert "ingest" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    "option", [("--actors", "2"), ("--cpus", "2"), ("--distinct",), ("--node-label", "a=b")]
)
def test_one_file_of_captions_has_no_pool(
    option: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.txt").write_text("a cat\n")
    words = ("embed", tmp_path / "c.txt", "--encoder", "smollm2")
    told = fails(capsys, *words, "--out", tmp_path / "states.parquet", *option)
    assert "--out computes in this process: leave out --actors" in told
    assert not (tmp_path / "states.parquet").exists()


def test_a_file_of_captions_needs_a_place_for_its_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.txt").write_text("a cat\n")
    told = fails(capsys, "embed", tmp_path / "c.txt", "--encoder", "smollm2")
    assert told.endswith(
        "c.txt: a file, not a corpus; its states in one file: --out states.parquet"
    )


def test_a_setting_as_an_option_is_told_how_it_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = fails(capsys, "train", "--steps", "100", "demo")
    assert "--steps" in told
    assert "settings are written key=value: train.steps=200 (see " in told
    told = fails(capsys, "evaluate", "M", "--per-tag", "3")
    assert "lidit evaluate: No such option: --per-tag" in told
    assert "key=value: per_tag=24 (see " in told
    assert told.endswith("lidit evaluate --help)")
    assert "key=value" not in fails(capsys, "runs", "--steps", "100")


def test_the_users_own_folder_is_no_place_for_a_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    told = fails(capsys, "inspect", tmp_path / "mine")
    assert told.endswith(f"--corpus {tmp_path / 'mine'}"), "an empty folder can become one"
    (tmp_path / "mine" / "photo.jpg").touch()
    for job in (("inspect",), ("verify",), ("embed", "--encoder", "smollm2")):
        told = fails(capsys, *job, tmp_path / "mine")
        assert told.startswith(f"error: {tmp_path / 'mine'}: is not a corpus (no corpus.json)")
        assert told.endswith("in a new folder with: lidit ingest SOURCE --corpus CORPUS")


def test_places_that_cannot_be_written_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(capsys, "scenes", "--out", "/proc/x", "--count", "4").startswith(
        "error: /proc/x: cannot be opened"
    )
    assert "local folder" in fails(capsys, "scenes", "--out", "s3://bucket/scenes", "--count", "4")
    (tmp_path / "file").touch()
    told = fails(capsys, "scenes", "--out", tmp_path / "file" / "x", "--count", "4")
    assert (
        told == f"error: {tmp_path}/file/x: cannot be opened or made (Not a directory); give "
        "another path"
    )


@pytest.mark.parametrize("label", ["pool", "=x", "pool="])
@pytest.mark.parametrize(
    "words", [("embed", "corpus", "--encoder", "smollm2"), ("latents", "corpus")]
)
def test_a_node_label_is_key_and_value(
    words: tuple[str, ...], label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "a label is KEY=VALUE" in fails(capsys, *words, "--node-label", label)


@pytest.fixture
def job_raising(monkeypatch: pytest.MonkeyPatch) -> JobRaising:
    def make(error: BaseException) -> typer.Typer:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.command()
        def job() -> None:
            raise error

        return app

    monkeypatch.setattr(sys, "argv", ["job"])
    return make


@pytest.fixture
def ends(job_raising: JobRaising, capsys: pytest.CaptureFixture[str]) -> Ends:
    """Exit code and stderr of a job that raises an error."""

    def run(error: BaseException) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            guarded(job_raising(error))
        return int(end.value.code or 0), capsys.readouterr().err

    return run


def test_what_the_file_system_refuses(
    tmp_path: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "new"))
    line = (
        f"{tmp_path}/new: cannot be written (Permission denied); give a folder you may "
        "write, or fix its owner"
    )
    assert ends(denied) == (2, f"error: {line}\n")
    assert ends(RayTaskError("f", "a traceback", denied).as_instanceof_cause()) == (
        2,
        f"error: {line}\n",
    )
    read_only = OSError(errno.EROFS, "", str(tmp_path))
    assert "cannot be written (Read-only file system)" in ends(read_only)[1]
    full = OSError(errno.ENOSPC, "", "a/file")
    assert ends(full)[0] == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: mode == os.F_OK)  # root may read everything
        assert "cannot be read (Permission denied); give a path you may read" in ends(denied)[1]


def test_an_object_stores_refusal_is_one_line_also_out_of_a_task(ends: Ends) -> None:
    refusal = StorageError("s3://bucket/x: no credentials")
    for error in (refusal, RayTaskError("f", "a traceback", refusal).as_instanceof_cause()):
        assert ends(error) == (2, "error: s3://bucket/x: no credentials\n")


@pytest.mark.parametrize(
    "bug",
    [OSError("no file in it"), OSError(errno.EIO, "", "a/file"), ValueError("x"), KeyError("x")],
)
def test_bugs_keep_their_traceback(bug: Exception, job_raising: JobRaising) -> None:
    with pytest.raises(type(bug)):
        guarded(job_raising(bug))


def test_ctrl_c_and_a_jobs_own_exit_code(ends: Ends) -> None:
    code, told = ends(KeyboardInterrupt())
    assert code == 130
    assert told.startswith("interrupted: everything finished is kept")
    assert ends(typer.Exit(3)) == (3, "")


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
    assert (
        lidit("ingest", tmp_path / "s", "--corpus", tmp_path / "c", "--set", "resolution=32") == 0
    )
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

    command = shutil.which("lidit", path=str(Path(sys.executable).parent))
    assert command
    done = subprocess.run(
        [command, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "evaluate" in done.stdout


def test_the_version_names_its_commit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lidit("--version") == 0
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    commit = head.stdout.strip() or "unknown"
    assert re.fullmatch(
        rf"lidit {re.escape(str(__version__))}, commit {commit}( with changes)?\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize("job", JOBS)
def test_every_way_to_ask_for_help_gives_the_same(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for words in ((job, "--help"), (job, "-h"), ("help", job)):
        assert lidit(*words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert f"lidit {job}" in texts[0]


def test_help_without_a_command_lists_them_and_an_unknown_one_is_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = []
    for words in (("--help",), ("-h",), ("help",)):
        assert lidit(*words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert "│ submit " in texts[0]
    assert "did you mean 'train'" in fails(capsys, "help", "trian").lower()


@pytest.mark.parametrize(
    "prompt", ["caf\udce9", "a\0b", "x" * 100_001], ids=["bytes", "NUL", "long"]
)
def test_a_prompt_that_is_no_text_is_told_before_a_model_is_loaded(
    prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = fails(
        capsys, "sample", tmp_path / "absent", "--prompt", "ein Würfel", "--prompt", prompt
    )
    assert told.startswith("error: --prompt: prompt 2: ")
    assert "--prompt: prompt 1: " in fails(
        capsys, "report", tmp_path, tmp_path / "b", "--prompt", prompt
    )


@pytest.mark.parametrize(("seed", "count"), [(2**64, 1), (10**30, 1), (2**64 - 1, 2)])
def test_seeds_of_more_than_64_bits_are_refused(
    seed: int, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("sample", tmp_path / "absent", "--prompt", "x", "--count")
    assert "(64 bits)" in fails(capsys, *words, str(count), "--seed", str(seed))
    assert "no such model folder" in fails(capsys, *words, "1", "--seed", str(2**64 - 1))
