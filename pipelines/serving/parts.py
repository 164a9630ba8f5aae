"""What comes back while an order is drawn, in this order: one `Accepted`, any `Step`s and
`Preview`s, the `Picture`s.

Plain values, so that they can go from process to process.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.serving.finisher import File


@dataclass(frozen=True)
class Accepted:
    """The words passed their checks and were read; the network comes next. tokens: of the prompt,
    as LLMs count.
    """

    tokens: int


@dataclass(frozen=True)
class Step:
    """An image has taken so many of its steps."""

    image: int
    number: int
    total: int


@dataclass(frozen=True)
class Preview:
    """An image as it would become, encoded as its picture will be."""

    image: int
    number: int
    data: bytes


@dataclass(frozen=True)
class Picture:
    """A finished image."""

    image: int
    seed: int
    file: File


Part = Accepted | Step | Preview | Picture
