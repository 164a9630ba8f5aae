"""What every picture set is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lidit.datasets.packages import Package

Files = Mapping[str, Mapping[str, bytes]]  # package name -> path in the package -> content


@dataclass(frozen=True)
class Picture:
    """One image file as the package holds it, with what is said of it.

    captions: (text, origin), the plain one first. ties: pictures that share one are near copies of
    each other and must be on one side of a split; equal bytes are a tie of their own. origin:
    package and path, for attribution.
    """

    key: str
    suffix: str
    content: bytes
    captions: tuple[tuple[str, str], ...]
    ties: tuple[str, ...]
    origin: str
    licence: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """A file that makes no picture, and why."""

    origin: str
    reason: str


@dataclass(frozen=True)
class PictureSet:
    """wanted: which files of its packages are read; pictures: from them to pictures, in a fixed
    order.

    attribution: who made the art and under which terms, Markdown; written beside the tars.
    """

    name: str
    packages: tuple[Package, ...]
    wanted: Callable[[str], bool]
    pictures: Callable[[Files], Iterator[Picture | LeftOut]]
    attribution: str
