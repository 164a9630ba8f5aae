"""The log of issued pictures: sha256 and perceptual hash of each, in a sqlite file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Issued:
    """One picture: `picture` is its own id, `request` the one it came from, `issued` seconds since 1970."""

    picture: str
    request: str
    sha256: str
    perceptual: int
    watermark: int | None
    issued: float


@dataclass(frozen=True)
class IssuedFinding:
    """match: "exact" (these bytes), "mark" (the watermark's payload), "near" (perceptual distance <= 6 of 64 bits)."""

    match: Literal["exact", "mark", "near"]
    picture: Issued
    distance: int


class IssuedLog:
    """Threads and processes of a machine may share a log. Raises ProvenanceUnavailable where it cannot be used."""

    def __init__(self, path: Path, create: bool = False) -> None:
        raise NotImplementedError

    def add(self, picture: bytes, image: Image, request: str, watermark: int | None = None) -> Issued:
        """Note a picture before it is delivered: its final bytes, and its pixels."""
        raise NotImplementedError

    def find(self, picture: bytes, image: Image, watermark: int | None = None) -> IssuedFinding | None:
        """The issued picture that this file is or comes from; an exact match before a mark before a near one."""
        raise NotImplementedError


def perceptual_hash(image: Image) -> int:
    """64 bits of the picture's coarse brightness: changes little with scaling and compression."""
    raise NotImplementedError
