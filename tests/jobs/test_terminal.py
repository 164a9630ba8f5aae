"""Names, captions and reasons may hold any characters; the terminal and the logs get none that
steer them.
"""

import io
import logging
import sys
import tarfile
from pathlib import Path

import pytest
import typer
from rich.console import Console

from jobs.support.start import guarded
from jobs.support.terminal import PlainFormatter, PlainStream
from lidit.errors import InputError, JobError, one_line, plain
from lidit.store import Corpus
from lidit.store.summary import summarise
from tests.helpers.command import lidit

STEERING = "\x1b]0;title\x07 \x1b[2J\x9b1A \r\x08\x7f\u202edcba\u2066"
WRITTEN = "\\x1b]0;title\\x07 \\x1b[2J\\x9b1A \\r\\x08\\x7f\\u202edcba\\u2066"


def test_control_characters_are_written_out_and_text_stays() -> None:
    assert plain(STEERING) == WRITTEN
    assert plain("\x1b[1;31mred\x1b[0m") == "red"
    assert (
        plain("zwei\nZeilen\tWürfel 一个 \U0001f600 \u200d")
        == "zwei\nZeilen\tWürfel 一个 \U0001f600 "
        "\u200d"
    )
    assert plain("caf\udce9") == "caf\\udce9"
    assert one_line(ValueError("a\n \x1b[2Jb")) == "a \\x1b[2Jb"


def test_what_a_command_prints_is_plain_and_rich_keeps_its_colours() -> None:
    below = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", newline="")
    stream = PlainStream(below)
    print(STEERING, "ü", "\udce9", file=stream)
    stream.write("\r50%\x1b[K")
    Console(file=stream, force_terminal=True, color_system="standard").print("[red]x[/red]")  # type: ignore[arg-type]
    below.flush()
    text = below.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert text.startswith(WRITTEN.replace("\\u202e", "\\u202e") + " \\xfc \\udce9\n\r50%\\x1b[K")
    assert text.endswith("\x1b[31mx\x1b[0m\n")


@pytest.mark.parametrize("error", [InputError, JobError])
def test_errors_and_prints_of_a_job_are_plain(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def job() -> None:
        print(f"read {STEERING}")
        raise error(f"{STEERING}: no such file")

    monkeypatch.setattr(sys, "argv", ["job"])
    before = sys.stdout
    with pytest.raises(SystemExit):
        guarded(app)
    assert sys.stdout is before
    captured = capsys.readouterr()
    assert captured.out == f"read {WRITTEN}\n"
    assert captured.err.endswith(f"{WRITTEN}: no such file\n")


def test_log_lines_are_plain() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "prompt %s", (STEERING,), None)
    assert (
        PlainFormatter("%(levelname)s: %(message)s").format(record) == f"WARNING: prompt {WRITTEN}"
    )


def test_words_of_the_command_line_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    assert lidit("embed", STEERING, "--encoder", STEERING) == 2
    assert lidit(STEERING) == 2
    captured = capsys.readouterr()
    assert not set("\x1b\x07\x9b\u202e") & set(captured.out + captured.err)


def test_inspect_shows_reasons_that_look_like_markup(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s[/red]"
    folder.mkdir(parents=True)  # "s[" and "red]", which look like markup together
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("ok.txt", b"a cat"), ("z[/i][bold]\x1b[2J.txt", b"x" * 4000)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = (folder / "a.tar").read_bytes()
    (folder / "a.tar").write_bytes(whole[:2600])  # within the second member
    corpus = tmp_path / "c[/b]"
    assert lidit("ingest", folder, "--corpus", corpus, "--set", "captions_only=true") == 0
    reasons = summarise(Corpus.open(corpus)).reasons
    assert reasons
    capsys.readouterr()
    assert lidit("inspect", corpus) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out
    assert str(corpus) in captured.out.replace("\n", "")
    for reason in reasons:
        assert plain(reason) in captured.out
