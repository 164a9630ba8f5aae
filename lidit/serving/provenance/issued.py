"""The log of issued pictures: sha256 and perceptual hash of each, in a sqlite file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from scipy import fft

from lidit.errors import one_line
from lidit.serving.provenance.manifest import ProvenanceUnavailable

Image = NDArray[np.uint8]
NEAR = 6  # bits of 64 that a scaled or compressed copy may differ in
EVEN = 4.0  # grey levels: a picture of less contrast has no likeness to tell it by
WAIT = 5.0  # seconds for another process's transaction
PART = 1 << 16  # rows that are compared at once
SCHEMA = """
CREATE TABLE IF NOT EXISTS issued (
    picture TEXT PRIMARY KEY, request TEXT NOT NULL, sha256 TEXT NOT NULL, perceptual INTEGER,
    watermark INTEGER, issued REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS by_sha256 ON issued (sha256);
CREATE INDEX IF NOT EXISTS by_watermark ON issued (watermark);
"""


@dataclass(frozen=True)
class Issued:
    """One picture: `picture` is its own id, `request` the one it came from, `issued` seconds since
    1970.

    perceptual: None for a picture too even to be told by its likeness.
    """

    picture: str
    request: str
    sha256: str
    perceptual: int | None
    watermark: int | None
    issued: float


@dataclass(frozen=True)
class IssuedFinding:
    """match: "exact" (these bytes), "mark" (the watermark's payload), "near" (perceptual distance
    <= 6 of 64 bits).
    """

    match: Literal["exact", "mark", "near"]
    picture: Issued
    distance: int


class IssuedLog:
    """Threads and processes of a machine may share a log. Raises ProvenanceUnavailable where it
    cannot be used.
    """

    def __init__(
        self, path: Path, create: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self._clock = path, clock
        if create:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise ProvenanceUnavailable(f"{path}: cannot be made ({error.strerror})") from None
            with self._transaction() as database:
                for statement in filter(str.strip, SCHEMA.split(";")):
                    database.execute(statement)
        with self._transaction() as database:
            database.execute("SELECT count(*) FROM (SELECT 1 FROM issued LIMIT 1)")

    def add(
        self, picture: bytes, image: Image, request: str, watermark: int | None = None
    ) -> Issued:
        """Note a picture before it is delivered: its final bytes, and its pixels."""
        digest = hashlib.sha256(picture).hexdigest()
        row = Issued(
            secrets.token_hex(16), request, digest, perceptual_hash(image), watermark, self._clock()
        )
        with self._transaction() as database:
            database.execute("INSERT INTO issued VALUES (?, ?, ?, ?, ?, ?)", _stored(row))
        return row

    def find(
        self, picture: bytes, image: Image, watermark: int | None = None
    ) -> IssuedFinding | None:
        """The issued picture that this file is or comes from; an exact match before a mark before a
        near one.
        """
        digest, own = hashlib.sha256(picture).hexdigest(), perceptual_hash(image)
        with self._transaction() as database:
            if row := database.execute(
                "SELECT * FROM issued WHERE sha256 = ?", (digest,)
            ).fetchone():
                return IssuedFinding("exact", _issued(row), 0)
            if watermark is not None:
                rows = map(
                    _issued,
                    database.execute("SELECT * FROM issued WHERE watermark = ?", (watermark,)),
                )
                found = [(distance(own, row.perceptual), row) for row in rows]
                if found:
                    nearest, row = min(found, key=lambda pair: pair[0])
                    return IssuedFinding("mark", row, nearest)
            return None if own is None else _nearest(database, own)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection to the file, which is never made here; an exception takes
        everything back.
        """
        try:
            address = f"{self.path.absolute().as_uri()}?mode=rw"
            with contextlib.closing(sqlite3.connect(address, uri=True, timeout=WAIT)) as database:
                database.execute("PRAGMA synchronous = FULL")
                with database:
                    yield database
        except sqlite3.Error as error:
            raise ProvenanceUnavailable(
                f"{self.path}: the log of pictures cannot be used ({one_line(error, 200)})"
            ) from None


def perceptual_hash(image: Image) -> int | None:
    """64 bits of the picture's coarse brightness: changes little with scaling and compression. None
    where the picture is too even.
    """
    grey = np.asarray(
        Pillow.fromarray(image).convert("L").resize((32, 32), Pillow.Resampling.LANCZOS), float
    )
    if grey.std() < EVEN:
        return None
    # without the mean: brightness says nothing
    coarse = fft.dctn(grey, norm="ortho")[:8, :8].reshape(-1)[1:]
    bits = np.append(coarse > np.median(coarse), [False])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def distance(first: int | None, second: int | None) -> int:
    """Bits in which two perceptual hashes differ; 64 where there is none."""
    return 64 if first is None or second is None else (first ^ second).bit_count()


def _nearest(database: sqlite3.Connection, own: int) -> IssuedFinding | None:
    """The first of the pictures that look most like this one, if any looks like it. Reads the whole
    log.
    """
    best: tuple[int, str] | None = None
    rows = database.execute(
        "SELECT perceptual, picture FROM issued WHERE perceptual IS NOT NULL ORDER BY rowid"
    )
    while part := rows.fetchmany(PART):
        differing = np.array([row[0] for row in part], np.int64) ^ np.int64(_signed(own))
        bits = np.bitwise_count(differing.view(np.uint64))
        place = int(bits.argmin())
        if bits[place] <= NEAR and (best is None or bits[place] < best[0]):
            best = int(bits[place]), part[place][1]
    if best is None:
        return None
    row = database.execute("SELECT * FROM issued WHERE picture = ?", (best[1],)).fetchone()
    return IssuedFinding("near", _issued(row), best[0])


def _stored(row: Issued) -> tuple[object, ...]:
    """sqlite's integers have a sign."""
    picture, request, sha256, perceptual, watermark, issued = astuple(row)
    return (
        picture,
        request,
        sha256,
        None if perceptual is None else _signed(perceptual),
        watermark,
        issued,
    )


def _issued(row: tuple[str, str, str, int | None, int | None, float]) -> Issued:
    picture, request, sha256, perceptual, watermark, issued = row
    unsigned = None if perceptual is None else perceptual % (1 << 64)
    return Issued(picture, request, sha256, unsigned, watermark, issued)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
