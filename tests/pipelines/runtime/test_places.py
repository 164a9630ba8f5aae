"""Where an embedded Ray keeps its files: short folders that can be written, told when they are not
the asked ones.
"""

import os
import stat
from pathlib import Path

import pytest

from lidit.errors import InputError
from pipelines.runtime.places import SESSION, SOCKET_BYTES, RayFolder, own_token, ray_folder, room

NOWHERE = "/proc/nowhere"  # nobody can make it, the administrator neither


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name is short enough, as /tmp is."""
    for name in (
        "RAY_TMPDIR",
        "TMPDIR",
        "XDG_RUNTIME_DIR",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_AUTH_MODE",
    ):
        monkeypatch.delenv(name, raising=False)
    return Path("/tmp")


def test_a_folder_that_serves_is_rays_own_choice(
    short: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    longest = short / ("x" * (room() - len("/ray") - len(f"{short}/")))
    monkeypatch.setenv("TMPDIR", str(longest))
    try:
        assert ray_folder([]) == RayFolder()
        sockets = f"{longest}/ray{SESSION.format(os.getpid())}"
        assert len(sockets) == SOCKET_BYTES
        monkeypatch.setenv("TMPDIR", f"{longest}x")
        assert ray_folder([str(short)]).folder is not None
    finally:
        (longest / "ray").rmdir()
        longest.rmdir()
    assert caplog.text.count("is too long for Ray's sockets") == 1


def test_a_long_folder_keeps_what_is_large(
    tmp_path: Path, short: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = tmp_path / "the-temporary-folder-of-a-job-on-a-cluster-with-long-names"
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    found = ray_folder([NOWHERE, str(short)])
    assert found.folder is not None
    private = Path(found.folder).parent
    assert private.parent == short
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert len(found.folder + SESSION.format(os.getpid())) <= SOCKET_BYTES
    assert found.spill == str(long)
    assert caplog.messages == [
        f"TMPDIR={long} is too long for Ray's sockets (their paths have at most 107 bytes): Ray's "
        f"temporary files go to {private}"
    ]


def test_a_folder_that_cannot_be_made_is_told(
    short: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv("RAY_TMPDIR", NOWHERE)  # Ray asks it first
    found = ray_folder([str(short)])
    assert found.folder is not None
    assert found.spill is None
    assert (
        caplog.text.count(f"RAY_TMPDIR={NOWHERE} cannot be used (No such file or directory)") == 1
    )


def test_no_folder_at_all_is_one_line(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", NOWHERE)
    with pytest.raises(
        InputError, match=f"^TMPDIR={NOWHERE} cannot be used .*; set RAY_TMPDIR to a folder"
    ) as refusal:
        ray_folder(["/proc/other", f"/tmp/{'x' * 100}"])
    assert "\n" not in str(refusal.value)


def test_the_token_is_kept_where_it_can_be(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    own_token()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    monkeypatch.setenv("HOME", NOWHERE)
    with pytest.raises(InputError, match=f"HOME={NOWHERE}: Ray cannot keep its token there"):
        own_token(["/proc/other"])
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    own_token()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")  # restored at the end of the test
    own_token([str(short)])
    file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(file.read_text()) == 64
