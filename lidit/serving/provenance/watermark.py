"""An invisible watermark of 32 bits in the brightness of a picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST_SIDE = 256
Image = NDArray[np.uint8]


class NoRoom(Exception):
    """The picture is too small, or too uniform at its extremes, to carry a watermark that can be read back."""


class Watermark:
    """secret: whoever has it can read the mark, forge it and take it out; the same for a whole deployment."""

    def __init__(self, secret: bytes) -> None:
        raise NotImplementedError

    def embed(self, image: Image, payload: int) -> Image:
        """The image [height, width, 3] with a payload in [0, 2**32), read back before it is returned. Raises NoRoom
        below 256 pixels and where the mark cannot be read back."""
        raise NotImplementedError

    def read(self, image: Image) -> int | None:
        """The payload, or None where no mark is found. Cropping is no hindrance, scaling and rotating are."""
        raise NotImplementedError
