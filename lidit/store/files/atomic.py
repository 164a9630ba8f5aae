"""How a file comes to be: whole or not at all, whenever the process is killed.

Local disk: temporary name, write, flush, fsync, rename, fsync of the folder. Object stores: spool
locally, one put. A unit is its data file (named by its content) and then its commit record, in that
order, each published like that.

A local writer holds an flock on its files until the record stands. So a cleaner can tell a dead
writer's leftovers (lock free) from a live writer's work (lock held), and the kernel releases the
lock even after kill -9.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from lidit.errors import InputError, JobError
from lidit.store.files.folder import Folder

TEMPORARY_PREFIX = ".tmp-"
CRASH_VARIABLE = "LIDIT_CRASH_AT"
# Every point at which the death of the process leaves a different state on disk, in order, for
# fault tests.
CRASH_POINTS = (
    "family-created",
    "shared-written",
    "data-opened",
    "data-written",
    "data-synced",
    "data-renamed",
    "data-durable",
    "record-opened",
    "record-written",
    "record-synced",
    "record-renamed",
    "record-durable",
    "table-published",
    "manifest-published",
)
# The same for rolling families: where a producer announces them, and where it deletes a unit.
ROLLING_POINTS = ("rolling-announced", "record-kept", "record-deleted", "data-deleted")
_passed: dict[str, int] = {}


def crash_point(point: str) -> None:
    """Kill this process here when `LIDIT_CRASH_AT` is `point` or `point:n` (the n-th passage, from
    1).
    """
    wanted = os.environ.get(CRASH_VARIABLE)
    if not wanted:
        return
    name, _, count = wanted.partition(":")
    if name not in (points := CRASH_POINTS + ROLLING_POINTS):
        raise InputError(f"{CRASH_VARIABLE}={wanted}: no such point; points: {', '.join(points)}")
    if name == point:
        _passed[point] = _passed.get(point, 0) + 1
        if _passed[point] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class FileDigest:
    """What was published under `name`: size in bytes and sha256 (hexadecimal)."""

    name: str
    bytes: int
    sha256: str


class _HashingWriter:
    """A file object that hashes what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.hash.update(view)
        self.bytes += view.nbytes
        self.file.write(view)
        return view.nbytes

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.closed = True


@contextlib.contextmanager
def published(
    folder: Folder,
    name: Callable[[str], str],
    write: Callable[[Any], None],
    points: str = "",
    exclusive: bool = False,
) -> Iterator[FileDigest]:
    """Publish one file and keep it locked inside the `with` block.

    `name` makes the final name from the content's sha256, `write` writes to a file object, `points`
    is the prefix of the crash points. With `exclusive`, FileExistsError is raised where the name is
    taken (local disk only). Raises JobError where the disk is full.
    """

    def point(suffix: str) -> None:
        if points:
            crash_point(f"{points}-{suffix}")

    with contextlib.ExitStack() as stack:
        try:
            file, temporary = _open_temporary(folder, stack)
            point("opened")
            sink = _HashingWriter(file)
            write(sink)
            file.flush()
            point("written")
            os.fsync(file.fileno())
            point("synced")
            digest = FileDigest(name(sink.hash.hexdigest()), sink.bytes, sink.hash.hexdigest())
            if folder.local:
                _rename(temporary, folder.path / digest.name, exclusive)
            else:
                folder.upload(str(temporary), digest.name)
            point("renamed")
            if folder.local:
                _sync_folder(folder.location)
            point("durable")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise JobError(
                    f"{folder.location}: {os.strerror(error.errno)}; finished units are safe: "
                    "free some space and run "
                    "the same command again"
                ) from None
            raise
        yield digest


def _open_temporary(folder: Folder, stack: contextlib.ExitStack) -> tuple[BinaryIO, Path]:
    if not folder.local:
        spool = stack.enter_context(tempfile.NamedTemporaryFile(prefix="lidit-"))  # noqa: SIM115
        return cast(BinaryIO, spool), Path(spool.name)
    while True:
        path = folder.path / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        file = path.open("xb")
        _try_lock(file.fileno())
        if os.fstat(file.fileno()).st_nlink:  # else a cleaner removed it between open and lock
            stack.callback(_discard, file, path)
            return file, path
        file.close()


def _discard(file: BinaryIO, path: Path) -> None:
    # After a rename the temporary name is gone; after an error it is ours to remove, also on a full
    # disk.
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with contextlib.suppress(OSError):
        file.close()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return False
    return True


def _rename(temporary: Path, final: Path, exclusive: bool) -> None:
    if not exclusive:
        temporary.replace(final)
        return
    try:
        final.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the last writer wins, which readers survive
        temporary.replace(final)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_bytes(
    folder: Folder, name: str, content: bytes, points: str = "", exclusive: bool = False
) -> FileDigest:
    """One small file under a fixed name."""
    with published(
        folder, lambda _: name, lambda sink: sink.write(content), points, exclusive
    ) as digest:
        return digest


def publish_written(folder: Folder, name: str, write: Callable[[Any], None]) -> FileDigest:
    """One file under a fixed name, of whatever `write` writes to the file object
    that it is given.
    """
    with published(folder, lambda _: name, write) as digest:
        return digest


def publish_table(
    folder: Folder, name: Callable[[str], str] | str, table: pa.Table, **options: Any
) -> FileDigest:
    """One Arrow IPC file; `name` is the file's name, or makes it from the content's sha256."""
    naming = (lambda _: name) if isinstance(name, str) else name
    with published(folder, naming, arrow_writer([table]), **options) as digest:
        return digest


def arrow_writer(tables: Iterable[pa.Table]) -> Callable[[Any], None]:
    """Writes tables of one schema as one Arrow IPC file, one record batch per table, as they are
    produced.
    """

    def write(sink: Any) -> None:
        remaining = iter(tables)
        first = next(remaining)
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), first.schema) as writer:
            for table in _chain(first, remaining):
                for batch in table.combine_chunks().to_batches():
                    writer.write_batch(batch)

    return write


def _chain(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from rest


def remove_if_abandoned(
    folder: Folder, name: str, still_needed: Callable[[], bool], grace_seconds: float
) -> bool:
    """Remove a leftover unless its writer lives. `still_needed` is asked again after the lock is
    held.

    Object stores have no locks: there a leftover is removed only once it is older than
    `grace_seconds`.
    """
    if not folder.local:
        age = folder.age(name)
        if age is None or age < grace_seconds or still_needed():
            return False
        folder.remove(name)
        return True
    try:
        descriptor = os.open(folder.where(name), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if not _try_lock(descriptor) or still_needed():
            return False
        folder.remove(name)
        return True
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Folder, grace_seconds: float = 3600.0) -> None:
    """Remove the temporary files that killed writers left in a folder; those of writers that live
    stay.
    """
    for name in folder.sizes():
        if name.startswith(TEMPORARY_PREFIX):
            remove_if_abandoned(folder, name, lambda: False, grace_seconds)
