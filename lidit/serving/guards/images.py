"""Checkers of images: a rule on pixels, and a classifier in an ONNX file. Images are uint8 arrays [height, width, 3]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lidit.config.settings import Settings

Image = NDArray[np.uint8]


class PixelRule:
    """Score: the share of pixels near `colour` against `share`, at most 1. Forbids, say, large red areas; for tests
    of what a real classifier would guard."""

    def __init__(self, colour: tuple[int, int, int], share: float, distance: float = 60.0) -> None:
        raise NotImplementedError

    @property
    def version(self) -> str:
        raise NotImplementedError

    def scores(self, images: Sequence[Image]) -> list[float]:
        raise NotImplementedError


class OnnxSettings(Settings):
    """A classifier file and how it wants its input. score = output[unsafe] after `activation`."""

    file: Path
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    height: int = 224
    width: int = 224
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (255.0, 255.0, 255.0)
    unsafe: int = 1
    activation: Literal["none", "softmax", "sigmoid"] = "softmax"


class OnnxClassifier:
    """Checker of images by onnxruntime on the CPU. Raises InputError without onnxruntime, the file or its sha256."""

    def __init__(self, settings: OnnxSettings) -> None:
        raise NotImplementedError

    @property
    def version(self) -> str:
        raise NotImplementedError

    def scores(self, images: Sequence[Image]) -> list[float]:
        raise NotImplementedError
