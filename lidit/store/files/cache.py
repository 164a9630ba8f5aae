"""A bounded copy on local disk of unit files behind a URL, so that every epoch but the first reads
locally.

Only files whose name carries their content's hash are kept: such a name never means other bytes.
The folder is
$LIDIT_STORE_CACHE (default: `objects` in $LIDIT_CACHE), its limit $LIDIT_STORE_CACHE_GIGABYTES
(default 20, 0 turns it off); what was used longest ago goes first. Any number of processes may
share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

CONTENT_NAME = re.compile(r"-([0-9a-f]{12})\.arrow$")
DEFAULT_GIGABYTES = 20.0
LOCKS = 64  # files that downloads share, so that no unit leaves one behind


def cache_limit() -> int:
    """Bytes the cache may take; 0 where it is off."""
    return int(float(os.environ.get("LIDIT_STORE_CACHE_GIGABYTES", DEFAULT_GIGABYTES)) * 1e9)


def cache_place(url: str) -> Path | None:
    """Where the file behind `url` is kept, there or not; None for files that are never kept."""
    if not CONTENT_NAME.search(url) or not cache_limit():
        return None
    general = os.environ.get("LIDIT_CACHE") or "~/.cache/lidit"
    folder = Path(os.environ.get("LIDIT_STORE_CACHE") or f"{general}/objects").expanduser()
    return folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{url.rsplit('/', 1)[1]}"


def cached_map(place: Path) -> mmap.mmap | None:
    """The kept file as private memory; None where it is not there (any more)."""
    try:
        with place.open("rb") as file:
            os.utime(place)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (FileNotFoundError, ValueError):  # mmap refuses an empty file
        return None


@contextlib.contextmanager
def one_download(place: Path) -> Iterator[None]:
    """Wait until no other process or thread of this machine is fetching this file; then look for it
    again.

    Without a folder that can be written there is no lock, and everybody fetches.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            number = int(hashlib.sha256(place.name.encode()).hexdigest(), 16) % LOCKS
            locks = place.parent.with_name(f"{place.parent.name}-locks")
            locks.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((locks / str(number)).open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def keep(place: Path, content: bytes | bytearray) -> None:
    """Keep a file's bytes unless they are not what the name says; a full or read-only disk is no
    reason to fail.
    """
    expected = CONTENT_NAME.search(place.name)
    if expected is None or len(content) > cache_limit():
        return
    if not hashlib.sha256(content).hexdigest().startswith(expected[1]):
        return
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        make_room(place.parent, len(content))
        descriptor, temporary = tempfile.mkstemp(dir=place.parent, prefix=".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            Path(temporary).replace(place)
        except OSError:
            Path(temporary).unlink()


def make_room(folder: Path, wanted: int) -> None:
    """Remove what was used longest ago until `wanted` bytes fit. Whoever has a file mapped keeps
    its bytes.
    """
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total + wanted <= cache_limit():
            return
        Path(path).unlink(missing_ok=True)
        total -= size
