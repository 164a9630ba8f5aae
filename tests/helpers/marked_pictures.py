"""Pictures to mark and what happens to pictures on their way: real photographs, drawn scenes,
crops, JPEG.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

Image = NDArray[np.uint8]
PHOTO = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def photo(size: int) -> Image:
    """A portrait photograph that comes with matplotlib."""
    with Pillow.open(PHOTO) as opened:
        return np.asarray(
            opened.convert("RGB")
            .crop((0, 0, 512, 512))
            .resize((size, size), Pillow.Resampling.LANCZOS)
        )


def scene(size: int, seed: int = 0) -> Image:
    """Even circles and squares on an even ground: the hardest to hide anything in."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    image = np.empty((size, size, 3), np.uint8)
    image[:] = random.integers(0, 256, 3)
    for number in range(6):
        row, column, radius = (
            random.integers(0, size),
            random.integers(0, size),
            random.integers(size // 10, size // 3),
        )
        far = (
            np.hypot(y - row, x - column)
            if number % 2
            else np.maximum(abs(y - row), abs(x - column))
        )
        image[far < radius] = random.integers(0, 256, 3)
    return image


def even(size: int, value: int = 255) -> Image:
    return np.full((size, size, 3), value, np.uint8)


def encoded(image: Image, kind: str = "PNG", quality: int = 75) -> bytes:
    content = io.BytesIO()
    Pillow.fromarray(image).save(content, kind, quality=quality)
    return content.getvalue()


def compressed(image: Image, quality: int = 75) -> Image:
    """The image after JPEG."""
    return np.asarray(Pillow.open(io.BytesIO(encoded(image, "JPEG", quality))).convert("RGB"))


def cropped(image: Image, share: float = 0.1, seed: int = 0) -> Image:
    """A part of the image from anywhere in it, `share` less of each side."""
    random = np.random.default_rng(seed)
    height, width = (round(side * (1 - share)) for side in image.shape[:2])
    top, left = (
        random.integers(0, whole - part + 1) for whole, part in zip(image.shape, (height, width))
    )
    return image[top : top + height, left : left + width]
