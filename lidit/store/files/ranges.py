"""Ranges of a unit file behind a URL, and a sparse copy on local disk of those that were read.

What a range holds is known from its checksum alone, so the copy needs no list of what is in it: a
hole reads as zeros, which are not what was written, and is then fetched. Any number of processes
may share the copy, and it goes as whole copies go (see `cache`). Where the cache is off nothing is
kept.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from lidit.store.files.cache import cache_limit, cache_place, make_room
from lidit.store.files.folder import Folder

Range = tuple[int, int]
SUFFIX = ".rows"


class RangedBytes:
    """A file of which only the ranges that are asked for are read."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        whole = cache_place(folder.where(name)) if cache_limit() else None
        self.copy = None if whole is None else whole.with_name(whole.name + SUFFIX)
        self.absent: set[Range] = set()  # from the copy, as far as this reader knows

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        """The bytes from each first place up to each second one, from the copy unless they were
        forgotten.
        """
        found = {wanted: memoryview(bytearray()) for wanted in ranges if wanted[0] == wanted[1]}
        there = [wanted for wanted in ranges if wanted not in found and wanted not in self.absent]
        if self.copy is not None and self.copy.exists():
            found |= _from_copy(self.copy, there)
        missing = sorted({wanted for wanted in ranges if wanted not in found})
        fetched = self._fetch(missing)
        if fetched and self.copy is not None:
            _keep(self.copy, fetched)
            self.absent -= fetched.keys()
        found |= {wanted: memoryview(content) for wanted, content in fetched.items()}
        return [found[wanted] for wanted in ranges]

    def forget(self, ranges: Sequence[Range]) -> bool:
        """Take these ranges from the store at the next read. False where that was done already."""
        fresh = {wanted for wanted in ranges if wanted[0] != wanted[1]} - self.absent
        self.absent |= fresh
        return bool(fresh) and self.copy is not None

    def _fetch(self, ranges: Sequence[Range]) -> dict[Range, bytearray]:
        """Neighbours by one request, others side by side where the store's client can."""
        joined: list[list[int]] = []
        for start, stop in ranges:
            if joined and joined[-1][1] == start:
                joined[-1][1] = stop
            else:
                joined.append([start, stop])
        found = {}
        contents = (
            self.folder.read_ranges(self.name, [(start, stop) for start, stop in joined])
            if joined
            else []
        )
        pieces = iter(zip(joined, contents, strict=True))
        (first, last), content = next(pieces, ([0, 0], b""))
        for start, stop in ranges:
            if start >= last:
                (first, last), content = next(pieces)
            found[start, stop] = bytearray(content[start - first : stop - first])
        return found


def _from_copy(copy: Path, ranges: Sequence[Range]) -> dict[Range, memoryview]:
    """What lies in the copy at these places, be it a hole; nothing where the copy has just gone."""
    found = {}
    with contextlib.suppress(FileNotFoundError), copy.open("rb") as file:
        os.utime(copy)
        size = os.fstat(file.fileno()).st_size
        for start, stop in ranges:
            if stop <= size:
                found[start, stop] = memoryview(
                    bytearray(os.pread(file.fileno(), stop - start, start))
                )
    return found


def _keep(copy: Path, contents: dict[Range, bytearray]) -> None:
    """Write into the copy; a full or read-only disk is no reason to fail."""
    with contextlib.suppress(OSError):
        copy.parent.mkdir(parents=True, exist_ok=True)
        make_room(copy.parent, sum(map(len, contents.values())))
        descriptor = os.open(copy, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            for (start, _), content in contents.items():
                os.pwrite(descriptor, content, start)
        finally:
            os.close(descriptor)
