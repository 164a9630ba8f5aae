"""Progress: bars that share a terminal; without one, plain lines with count, rate and time left."""

import threading

import pytest

from pipelines.runtime import progress
from pipelines.runtime.progress import Display, ProgressBar, duration


def test_plain_lines_count_only_what_this_process_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with ProgressBar("embed x", 1000, "captions", start=500) as shown:
        for _ in range(4):
            clock[0] += 10
            shown.advance(50, "7 cut")
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "embed x: 600/1000 captions, 5.0 captions/s, 1:20 left, 0:20 gone, 7 cut"
    assert len(lines) == 4, "the last line is not said again at the end"


def test_the_end_is_told_also_where_nothing_was_told_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ProgressBar("score", 3, "images") as shown:
        for _ in range(3):
            shown.advance()
    with ProgressBar("draw", 4, "images", start=4):
        pass
    with pytest.raises(OSError, match="what is wrong"), ProgressBar("embed", 5, "captions"):
        raise OSError("the error says what is wrong")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("score: 3/3 images")
    assert second.startswith("draw: 4/4 images")


def test_the_rate_forgets_a_slow_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with ProgressBar("train", 100, "steps") as shown:
        clock[0] = 100
        for _ in range(30):
            clock[0] += 1
            shown.advance()
    assert "1.0 steps/s, 1:10 left" in capsys.readouterr().err.splitlines()[-1]


def test_a_total_may_come_from_the_work_and_grow(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("latents", None, "units"):
        pass  # a finished family expects nothing
    with ProgressBar("verify", None, "files") as shown:
        shown.expect(2)
        shown.update(2)
        shown.expect(6)
        shown.update(5, "a note")
    with ProgressBar("ingest", None, "files") as shown:
        shown.expect(4, done=4)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("verify: 5/6 files")
    assert first.endswith("a note")
    assert second.startswith("ingest: 4/4 files")


def test_bars_of_several_threads_share_one_display(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    both = threading.Barrier(2, timeout=20)
    shown: list[object] = []

    def work(title: str, display: Display) -> None:
        with ProgressBar(title, 2, "captions", display=display) as bar:
            shown.append(display.bars())
            both.wait()
            bar.advance(2)

    with Display() as display:
        threads = [
            threading.Thread(target=work, args=(title, display))
            for title in ("embed one", "embed two")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        bars = display.bars()
        assert bars is not None
        assert sorted(task.description for task in bars.tasks) == ["embed one", "embed two"]
        assert all(task.completed == 2 for task in bars.tasks)
    assert shown == [bars, bars]
    written = capsys.readouterr().err
    assert "embed one" in written
    assert "embed two" in written
    with ProgressBar("alone", 1, "units") as bar:
        bar.advance()
    assert "alone" in capsys.readouterr().err


def test_durations() -> None:
    assert [duration(s) for s in (0, 61, 3600, 86_399.6)] == ["0:00", "1:01", "1:00:00", "24:00:00"]
