"""A folder with one owner: the second command is refused, a dead owner's mark is nobody's."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lidit.errors import InputError
from lidit.store.files import owner
from lidit.store.files.owner import MARK, owned

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from pathlib import Path
from lidit.store.files.owner import owned
with owned(Path(sys.argv[1]), "trained"):
    print("held", flush=True)
    sys.stdin.read()  # until it is killed, or the test that started it is gone
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns tmp_path/run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_the_first_is(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(InputError) as refusal, owned(tmp_path / "run", "evaluated"):
        pass
    told = (
        rf"run: is being trained by process {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d .*; "
        r"wait for its end"
    )
    assert re.search(told, str(refusal.value))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_killed_owner_leaves_nothing_behind(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / MARK).exists()
    with owned(tmp_path / "run", "trained"):
        assert str(os.getpid()) in (tmp_path / "run" / MARK).read_text()
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_the_mark_goes_with_its_owner_and_work_stays(tmp_path: Path) -> None:
    with owned(tmp_path / "empty", "trained"):
        assert (tmp_path / "empty" / MARK).exists()
    assert not (tmp_path / "empty").exists()
    (tmp_path / "full").mkdir()
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "full", "trained"):
        (tmp_path / "full" / "work").write_text(str(1 // 0))
    with owned(tmp_path / "full", "trained"):
        (tmp_path / "full" / "work").write_text("kept")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["work"]
    with (
        owned(tmp_path / "full", "trained"),
        pytest.raises(InputError),
        owned(tmp_path / "full", "trained"),
    ):
        pass


def test_without_locks_a_touched_mark_counts_and_a_forgotten_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(owner.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(owner.fcntl, "flock", no_locks)
    with owned(tmp_path / "run", "trained"):
        with (
            pytest.raises(InputError, match="is being trained by process"),
            owned(tmp_path / "run", "trained"),
        ):
            pass
        long_ago = time.time() - owner.FORGOTTEN_SECONDS - 1
        os.utime(tmp_path / "run" / MARK, (long_ago, long_ago))
        with owned(tmp_path / "run", "trained"):
            assert (tmp_path / "run" / MARK).exists()
