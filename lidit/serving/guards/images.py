"""Checkers of images, uint8 arrays [height, width, 3]: a rule on pixels, and a classifier in an
ONNX file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from pydantic import Field, PositiveInt
from scipy.special import expit, softmax

from lidit.config.settings import Settings
from lidit.errors import InputError, one_line

Image = NDArray[np.uint8]
Three = tuple[float, float, float]
Spread = Annotated[float, Field(gt=0)]


class PixelRule:
    """Score: the share of pixels near `colour`, as a part of `share`, at most 1. Forbids, say,
    large red areas.

    It stands in for a classifier wherever verdicts have to be known beforehand.
    """

    def __init__(self, colour: tuple[int, int, int], share: float, distance: float = 60.0) -> None:
        if not 0 < share <= 1 or not distance > 0:
            raise InputError("a pixel rule needs a share in (0, 1] and a distance above 0")
        self.colour, self.share, self.distance = np.array(colour, float), share, distance
        self.version = f"pixels-{'-'.join(map(str, colour))}-{share:g}-{distance:g}"

    def scores(self, images: Sequence[Image]) -> list[float]:
        """Of each image."""
        return [self._score(_checked(image)) for image in images]

    def _score(self, image: Image) -> float:
        near = np.linalg.norm(image - self.colour, axis=2) <= self.distance
        return min(float(near.mean()) / self.share, 1.0)


class OnnxSettings(Settings):
    """A classifier in a file, and how it wants its input: (value - mean) / std of each channel.

    The score is number `unsafe` of the classifier's output after `activation`. sha256: of the file;
    another is refused.
    """

    file: Path
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    height: PositiveInt = 224
    width: PositiveInt = 224
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    mean: Three = (0.0, 0.0, 0.0)
    std: tuple[Spread, Spread, Spread] = (255.0, 255.0, 255.0)
    unsafe: Annotated[int, Field(ge=0)] = 1
    activation: Literal["none", "softmax", "sigmoid"] = "softmax"


class OnnxClassifier:
    """Checker of images by onnxruntime on the CPU. Raises InputError without onnxruntime, the file
    or its sha256.
    """

    def __init__(self, settings: OnnxSettings) -> None:
        self.settings = settings
        self.version = f"onnx-{settings.sha256[:12]}"
        # a guard that cannot work is found at the start, not at the first picture
        _ = self._session

    def scores(self, images: Sequence[Image]) -> list[float]:
        """Of each image."""
        return [self._score(_checked(image)) for image in images]

    @cached_property
    def _session(self) -> Any:
        file = self.settings.file
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(
                f"{file}: the classifier cannot be read ({error.strerror}); give its ONNX file"
            ) from None
        if hashlib.sha256(content).hexdigest() != self.settings.sha256:
            raise InputError(
                f"{file}: the classifier is not the file with this sha256; fetch it again"
            )
        try:
            runtime = import_module("onnxruntime")
        except ImportError:
            raise InputError(
                f"{file}: this guard needs onnxruntime; pip install onnxruntime"
            ) from None
        try:
            # From the bytes that were checked: a model in memory cannot reach for other files,
            # either.
            return runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class
            raise InputError(
                f"{file}: onnxruntime cannot load it ({one_line(error, 200)})"
            ) from None

    def _score(self, image: Image) -> float:
        wanted = self.settings
        resized = Pillow.fromarray(image).resize(
            (wanted.width, wanted.height), Pillow.Resampling.BILINEAR
        )
        pixels: NDArray[Any] = np.asarray(resized, dtype=np.float32)
        if wanted.channels == "BGR":
            pixels = pixels[..., ::-1]
        pixels = (pixels - np.array(wanted.mean, np.float32)) / np.array(wanted.std, np.float32)
        if wanted.layout == "NCHW":
            pixels = pixels.transpose(2, 0, 1)
        name = self._session.get_inputs()[0].name
        (output, *_) = self._session.run(None, {name: np.ascontiguousarray(pixels)[None]})
        return _activated(np.asarray(output, dtype=float).reshape(-1), wanted)


def _activated(output: NDArray[np.float64], settings: OnnxSettings) -> float:
    """The score; IndexError, which closes the guard, where the output has no such number."""
    if settings.activation == "softmax":
        output = softmax(output)
    elif settings.activation == "sigmoid":
        output = expit(output)
    return float(output[settings.unsafe])


def _checked(image: Image) -> Image:
    """The image; ValueError for another kind of array, whose score would mean nothing."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            f"an image is uint8 [height, width, 3], not {image.dtype} {list(image.shape)}"
        )
    return image
