"""A folder on local disk or behind any fsspec URL (s3://, gs://), with the few operations the store
needs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from lidit.errors import InputError
from lidit.store.files.cache import cache_place, cached_map, keep, one_download
from lidit.store.files.remote import plain_refusals


def is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")


def open_url(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). InputError where the package for such URLs is missing."""
    try:
        # Listings must be fresh: another writer may have published since the last look.
        file_system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"{url}: cannot be opened ({error}); install the fsspec package for such URLs"
        ) from None
    return file_system, str(root).rstrip("/")


_opened = cache(open_url)  # of the few folders a process works with


@contextlib.contextmanager
def _remote(location: str) -> Iterator[tuple[Any, str]]:
    """`open_url`; errors of the object store inside the `with` block become StorageError."""
    with plain_refusals(location):
        yield _opened(location)


@dataclass(frozen=True)
class Folder:
    """One folder; `location` is an absolute local path or a URL. Cheap to create and to send to
    another process.
    """

    location: str

    @classmethod
    def at(cls, path: str | os.PathLike[str] | Folder) -> Folder:
        if isinstance(path, Folder):
            return path
        text = str(path)
        if is_url(text):
            return cls(text.rstrip("/"))
        return cls(str(Path(text.removeprefix("file://")).expanduser().absolute()))

    @property
    def local(self) -> bool:
        return not is_url(self.location)

    @property
    def path(self) -> Path:
        """Local folders only."""
        return Path(self.location)

    def child(self, name: str) -> Folder:
        return Folder(f"{self.location}/{name}")

    def where(self, name: str) -> str:
        """Path or URL of a file in this folder, for messages and readers."""
        return f"{self.location}/{name}"

    def create(self) -> None:
        if self.local:
            self.path.mkdir(parents=True, exist_ok=True)

    def exists(self, name: str = "") -> bool:
        if self.local:
            return (self.path / name).exists()
        with _remote(self.location) as (file_system, root):
            return bool(file_system.exists(f"{root}/{name}".rstrip("/")))

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        try:
            if self.local:
                return (self.path / name).stat().st_size
            with _remote(self.location) as (file_system, root):
                return int(file_system.size(f"{root}/{name}"))
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """Files directly in this folder -> bytes. An absent folder is empty."""
        if self.local:
            found = {}
            with contextlib.suppress(FileNotFoundError), os.scandir(self.location) as entries:
                for entry in entries:
                    # Another writer may rename its temporary file between the listing and this
                    # look.
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_file():
                            found[entry.name] = entry.stat().st_size
            return found
        try:
            with _remote(self.location) as (file_system, root):
                entries = file_system.ls(root, detail=True)
        except FileNotFoundError:
            return {}
        # A web console marks a folder it makes with an empty object of the folder's own name.
        files = (
            entry
            for entry in entries
            if entry["type"] == "file" and not entry["name"].endswith("/")
        )
        return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in files}

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted. An absent folder is empty."""
        if self.local:
            try:
                with os.scandir(self.location) as entries:
                    return sorted(entry.name for entry in entries if entry.is_dir())
            except FileNotFoundError:
                return []
        try:
            with _remote(self.location) as (file_system, root):
                entries = file_system.ls(root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory"
        )

    def read_bytes(self, name: str) -> bytes:
        """Raises FileNotFoundError where there is no such file."""
        if self.local:
            return (self.path / name).read_bytes()
        with _remote(self.location) as (file_system, root):
            return bytes(file_system.cat_file(f"{root}/{name}"))

    def map(self, name: str, keep_local: bool = False) -> mmap.mmap | bytearray:
        """The file's bytes, as writable memory that never reaches the file: a private memory map
        where it is local.

        keep_local: a unit file behind a URL is read from its copy on local disk, and kept there
        (see `cache`).
        """
        if not self.local:
            place = cache_place(self.where(name)) if keep_local else None
            if place is None:
                return bytearray(self.read_bytes(name))
            if (kept := cached_map(place)) is not None:
                return kept
            with one_download(place):
                if (
                    kept := cached_map(place)
                ) is not None:  # while this process waited for another one's download
                    return kept
                content = bytearray(self.read_bytes(name))
                keep(place, content)
            return content
        with (self.path / name).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return bytearray()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes from each first place up to each second one. Raises FileNotFoundError where
        there is no file.
        """
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        if self.local:
            with (self.path / name).open("rb") as file:
                return [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]
        with _remote(self.location) as (file_system, root):
            paths = [f"{root}/{name}"] * len(ranges)
            return [
                bytes(found)
                for found in file_system.cat_ranges(paths, starts, stops, on_error="raise")
            ]

    def forget(self, name: str) -> bool:
        """Drop the local copy of a file behind a URL. True where there was one."""
        place = None if self.local else cache_place(self.where(name))
        if place is None or not place.exists():
            return False
        place.unlink(missing_ok=True)
        return True

    def read_table(self, name: str) -> pa.Table:
        """An Arrow IPC file. Raises FileNotFoundError, or pa.ArrowInvalid for a torn or foreign
        file.
        """
        return pa.ipc.open_file(pa.py_buffer(self.map(name))).read_all()

    def upload(self, local_path: str, name: str) -> None:
        """Object stores only: one atomic put."""
        with _remote(self.location) as (file_system, root):
            file_system.put_file(local_path, f"{root}/{name}")

    def remove(self, name: str) -> None:
        """Absent files are fine: another process may clean up too."""
        try:
            if self.local:
                (self.path / name).unlink()
            else:
                with _remote(self.location) as (file_system, root):
                    file_system.rm_file(f"{root}/{name}")
        except FileNotFoundError:
            pass

    def remove_tree(self) -> None:
        """This folder and everything in it."""
        for name in self.folders():
            self.child(name).remove_tree()
        for name in self.sizes():
            self.remove(name)
        if self.local and self.path.is_dir():
            self.path.rmdir()

    def age(self, name: str) -> float | None:
        """Seconds since an object was written, by the object store's clock; None where it is
        unknown.
        """
        try:
            with _remote(self.location) as (file_system, root):
                return time.time() - float(file_system.modified(f"{root}/{name}").timestamp())
        except (FileNotFoundError, NotImplementedError):
            return None
