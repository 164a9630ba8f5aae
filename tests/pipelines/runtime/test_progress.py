"""Progress without a terminal: plain lines with count, rate and time left."""

import pytest

from pipelines.runtime import progress
from pipelines.runtime.progress import Progress, duration


def test_plain_lines_count_only_what_this_process_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress("embed x", 1000, "captions", start=500) as shown:
        for _ in range(4):
            clock[0] += 10
            shown.advance(50, "7 cut")
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "embed x: 600/1000 captions, 5.0 captions/s, 1:20 left, 0:20 gone, 7 cut"
    assert len(lines) == 4, "the last line is not said again at the end"


def test_the_end_is_told_also_where_nothing_was_told_before(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("score", 3, "images") as shown:
        for _ in range(3):
            shown.advance()
    with Progress("draw", 4, "images", start=4):
        pass
    with pytest.raises(OSError, match="what is wrong"), Progress("embed", 5, "captions"):
        raise OSError("the error says what is wrong")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("score: 3/3 images")
    assert second.startswith("draw: 4/4 images")


def test_the_rate_forgets_a_slow_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress("train", 100, "steps") as shown:
        clock[0] = 100
        for _ in range(30):
            clock[0] += 1
            shown.advance()
    assert "1.0 steps/s, 1:10 left" in capsys.readouterr().err.splitlines()[-1]


def test_durations() -> None:
    assert [duration(s) for s in (0, 61, 3600, 86_399.6)] == ["0:00", "1:01", "1:00:00", "24:00:00"]
