"""A folder with one owner carries its owner's mark, so that two commands never write into it at
once.

The mark is a file with a lock that the kernel releases when its holder dies, however it dies. Where
the file system knows no locks, the holder touches the mark every few seconds instead, and a mark
that nobody touches is nobody's.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lidit.errors import InputError
from lidit.store.files.folder import Folder

MARK = ".owner"
HEARTBEAT_SECONDS = 5.0
FORGOTTEN_SECONDS = 60.0  # a network file system may show a touch this late
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def owned(place: Path | Folder, doing: str) -> Iterator[None]:
    """Hold a folder (made if it is absent) until the block ends; the mark is removed, an empty new
    folder too.

    Behind a URL nothing is held: object stores have no locks, and what is written there is
    published file by file.

    doing: what the owner does, as the refusal says it: "FOLDER is being trained by process 12 on
    HOST since ...". Raises InputError where another process, on this machine or another one, holds
    the folder.
    """
    folder = place if isinstance(place, Path) else place.path if place.local else None
    if folder is None:
        yield
        return
    if folder.is_file():
        raise InputError(f"{folder}: is a file; give a folder")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MARK
    descriptor, locked = _take(path, doing)
    stop = threading.Event()
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_mark(doing)).encode(), 0)
        if not locked:
            threading.Thread(target=_beat, args=(path, stop), daemon=True).start()
        yield
    finally:
        stop.set()
        # Removed before the lock is released: who waits for the old file finds that its name is
        # gone.
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def is_owned(folder: Path) -> bool:
    """Whether a process holds the folder now; a mark that a killed one left is nobody's."""
    try:
        descriptor = os.open(folder / MARK, os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared and for an instant: many may look at once.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return _is_touched(descriptor)
    finally:
        os.close(descriptor)


def _take(path: Path, doing: str) -> tuple[int, bool]:
    """An open mark, and whether it is locked. InputError where it is somebody's."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locked = _lock(descriptor)
            # its last owner removed it between the two lines above
            if locked and not _is_at(descriptor, path):
                os.close(descriptor)
                continue
            if not locked and _is_touched(descriptor):
                raise BlockingIOError
            return descriptor, locked
        except BlockingIOError:
            holder = _read(descriptor)
            os.close(descriptor)
            raise InputError(_refusal(path.parent, holder, doing)) from None


def _lock(descriptor: int) -> bool:
    """Whether the file system locks the mark. Raises BlockingIOError where another process holds
    it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_touched(descriptor: int) -> bool:
    """Without locks: whether a holder has touched the mark lately. A new, empty mark
    has no holder.
    """
    found = os.fstat(descriptor)
    return found.st_size > 0 and time.time() - found.st_mtime < FORGOTTEN_SECONDS


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            os.utime(path)
        except OSError:  # it is tried again; the work itself will say what is wrong with the disk
            continue


def _mark(doing: str) -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return {"doing": doing, "process": os.getpid(), "host": socket.gethostname(), "since": since}


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # its holder is about to write it
        found = None
    return found if isinstance(found, dict) else {}


def _refusal(folder: Path, holder: dict[str, Any], doing: str) -> str:
    who = f"process {holder.get('process', 'unknown')} on {holder.get('host', 'an unknown host')}"
    since = f" since {holder['since']}" if "since" in holder else ""
    return (
        f"{folder}: is being {holder.get('doing', doing)} by {who}{since}; wait for its end, "
        "stop it, or give this "
        "command another folder or name"
    )
