"""Where an embedded Ray keeps its files: folders that it can write and whose names leave room for
its sockets.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lidit.errors import InputError

SOCKET_BYTES = 107  # of a Unix socket's path on Linux
# What Ray puts behind its folder: the session's name ends with this process's number.
SESSION = "/session_2026-01-01_00-00-00_000000_{}/sockets/plasma_store"
# Folders that are short everywhere, the last two in memory: Ray spills to the user's own folder.
SHORT = ("/tmp", "/var/tmp", "/dev/shm")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayFolder:
    """folder: Ray's `_temp_dir`, None for Ray's own choice. spill: where objects go that memory has
    no room for.
    """

    folder: str | None = None
    spill: str | None = None


def ray_folder(short: Sequence[str] = SHORT) -> RayFolder:
    """The folder of RAY_TMPDIR, TMPDIR or /tmp where it serves; else a private one in the first of
    `short` that does.

    Raises InputError where no folder serves.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    base = os.environ[name] if name else "/tmp"
    asked = f"{name}={base}" if name else base
    problem = _problem(Path(base, "ray"))
    if problem is None:
        return RayFolder()

    runtime = os.environ.get("XDG_RUNTIME_DIR")
    for parent in dict.fromkeys([base, *short, *([runtime] if runtime else [])]):
        if (private := private_folder(parent)) is not None:
            log.warning("%s %s: Ray's temporary files go to %s", asked, problem, private)
            # Only the names of sockets must be short; what is large stays where the user wants it.
            spill = base if os.access(base, os.W_OK | os.X_OK) else None
            return RayFolder(str(private / "r"), spill)
    raise InputError(
        f"{asked} {problem}, and neither does {' nor '.join(short)} serve; set RAY_TMPDIR to a "
        f"folder you may write, of at most {room() - len('/ray')} bytes"
    )


def room() -> int:
    """How many bytes the name of Ray's folder may have."""
    return SOCKET_BYTES - len(SESSION.format(os.getpid()))


def private_folder(parent: str) -> Path | None:
    """A folder of this process alone, removed after Ray at the end; None where `parent` gives none
    that is short.
    """
    if len(os.fsencode(parent)) + len("/ray-12345678/r") > room():
        return None
    try:
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir=parent))
    except OSError:
        return None
    atexit.register(_remove, folder)
    return folder


def own_token(parents: Sequence[str] = SHORT) -> None:
    """A token file of this process where the home folder cannot keep the one that Ray makes.

    Raises InputError where no folder can keep it.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    home = os.environ.get("HOME")
    if home and _can_keep(Path(home, ".ray", "auth_token")):
        return
    for parent in parents:
        if (folder := private_folder(parent)) is not None:
            file = folder / "auth_token"
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32))
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)
            return
    raise InputError(
        f"HOME={home or ''}: Ray cannot keep its token there, nor in {', '.join(parents)}; set "
        "RAY_AUTH_TOKEN_PATH"
    )


def _problem(folder: Path) -> str | None:
    """Why Ray cannot use a folder, which is made if it does not exist."""
    if len(os.fsencode(folder)) > room():
        return f"is too long for Ray's sockets (their paths have at most {SOCKET_BYTES} bytes)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    return (
        None
        if os.access(folder, os.W_OK | os.X_OK)
        else "holds a folder ray that cannot be written"
    )


def _can_keep(file: Path) -> bool:
    """Whether a file can be read, or made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(file, os.R_OK) or (
        not os.access(file, os.F_OK) and os.access(file.parent, os.W_OK | os.X_OK)
    )


def _remove(folder: Path) -> None:
    import ray

    # its processes write there until they end; and this may run before Ray's own ending
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
