"""Aspect-ratio buckets: images of like shape share one size, near the area of the
base resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from lidit.store import Crop


@dataclass(frozen=True, order=True)
class Bucket:
    """Width and height in pixels; its text form is "WIDTHxHEIGHT"."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        width, height = text.split("x")
        return cls(int(width), int(height))


class Buckets:
    """All sides are multiples of `multiple`, areas close to resolution^2, aspect ratios at most
    `max_aspect`.
    """

    def __init__(self, resolution: int, multiple: int, max_aspect: float = 4.0) -> None:
        found = set()
        for short in range(multiple, resolution + 1, multiple):
            long = round(resolution * resolution / short / multiple) * multiple
            if short <= long <= max_aspect * short:
                found |= {Bucket(short, long), Bucket(long, short)}
        square = max(multiple, round(resolution / multiple) * multiple)
        self.all = tuple(sorted(found | {Bucket(square, square)}))

    def closest(self, width: int, height: int) -> Bucket:
        """The bucket whose aspect ratio is nearest; of equals, the narrower."""
        ratio = math.log(width / height)
        return min(self.all, key=lambda b: (round(abs(math.log(b.width / b.height) - ratio), 9), b))


def fit(image: Image.Image, bucket: Bucket) -> tuple[Image.Image, Crop]:
    """Resize to cover the bucket, cut the centre. Returns it with the crop in the original's
    pixels.
    """
    scale = max(bucket.width / image.width, bucket.height / image.height)
    width, height = min(image.width, bucket.width / scale), min(image.height, bucket.height / scale)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    crop = Crop(round(left), round(top), round(width), round(height))
    if image.size == (bucket.width, bucket.height):
        return image, crop
    return image.resize(
        (bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0
    ), crop
