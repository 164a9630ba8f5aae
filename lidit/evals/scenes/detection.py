"""Analysis by synthesis: which shapes, in which colours and where, an image of the scene benchmark
shows.

Every blob of a palette colour is compared with rendered shapes of its own area and centre; the best
one is accepted at a soft IoU of 0.80 or the blob is clutter. At a permissive 0.55, coloured noise
passes for shapes half of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lidit.datasets.scenes.layouts import LARGE, LIST_AREA_FACTOR, SMALL, disc_area
from lidit.datasets.scenes.shapes import BACKGROUND, COLOURS, Vocabulary, coverage
from lidit.errors import InputError

Floats = NDArray[np.float64]

ACCEPT_IOU = 0.80
FOREGROUND = 0.5  # coverage from which a pixel belongs to an object
PLATEAU_PERCENTILE, LEAST_PLATEAU, FULL_PLATEAU = 80, 0.7, 0.97
LEAST_AREA = 0.3 * LIST_AREA_FACTOR  # of a small object; lists hold objects of 0.62 of a small one
ONE_PASS_NOISE, TWO_PASS_NOISE = 0.035, 0.12
EXTRA_PASSES = 3  # how much softer than the analysed image a template may be
MARGIN = 3  # pixels around a blob in which its soft edge is looked for
LEAST_CONTRAST = 0.05  # a palette colour this close to the background cannot be told from it
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)
# a Laplacian blind to linear gradients
IMMERKAER = np.array([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])


@dataclass(frozen=True)
class Found:
    """One object: `iou` with the best template, `box` = (left, top, right, bottom) in pixels,
    `size` small or large.
    """

    shape: str
    colour: str
    iou: float
    x: float
    y: float
    area: float
    box: tuple[int, int, int, int]
    size: str


@dataclass(frozen=True)
class Analysis:
    """Accepted objects, best first, and the area in pixels of coloured blobs that are no known
    shape.
    """

    objects: tuple[Found, ...]
    clutter: float

    @property
    def valid_area(self) -> float:
        return sum(item.area for item in self.objects)


def binomial_blur(image: Floats, passes: int) -> Floats:
    """[1 2 1] / 4 along the first two axes, `passes` times, edges replicated. Same shape."""
    for _ in range(passes):
        for axis in (0, 1):
            image = ndimage.correlate1d(image, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
    return image


def noise_level(image: Floats) -> float:
    """Standard deviation of pixel noise from the median absolute Laplacian of an image [H, W, 3] in
    [0, 1].
    """
    response = np.stack(
        [ndimage.correlate(image[:, :, c], IMMERKAER)[1:-1, 1:-1] for c in range(3)]
    )
    return float(np.median(np.abs(response))) / (0.6745 * 6)


def analyse(image: NDArray[np.uint8], vocabulary: Vocabulary) -> Analysis:
    """Finds the objects of a square uint8 image [S, S, 3]. Raises InputError for any
    other array.
    """
    if (
        image.dtype != np.uint8
        or image.ndim != 3
        or image.shape[2] != 3
        or image.shape[0] != image.shape[1]
    ):
        raise InputError(
            f"a scene image is a square uint8 RGB array, found {image.dtype} {list(image.shape)}"
        )
    pixels = image.astype(float) / 255
    noise = noise_level(pixels)
    passes = 0 if noise < ONE_PASS_NOISE else 1 if noise < TWO_PASS_NOISE else 2
    alpha, nearest = _unmix(binomial_blur(pixels, passes), vocabulary)
    return _objects(alpha, nearest, vocabulary, passes)


def _unmix(pixels: Floats, vocabulary: Vocabulary) -> tuple[Floats, NDArray[np.int64]]:
    """Coverage [colours, H, W] of each palette colour over the background, and which colour
    explains a pixel best.
    """
    edge = np.ones(pixels.shape[:2], dtype=bool)
    edge[2:-2, 2:-2] = False
    background = np.median(pixels[edge], axis=0)
    # under a change of exposure the palette moves with the background
    palette = np.array([COLOURS[name] for name in vocabulary.colours]) / 255 + (
        background - BACKGROUND / 255
    )
    directions = np.clip(palette, 0, 1) - background
    squared = (directions**2).sum(axis=1)
    visible = squared > LEAST_CONTRAST**2
    offset = pixels - background
    alpha = np.clip(
        np.einsum("hwc,kc->khw", offset, directions) / np.maximum(squared, 1e-6)[:, None, None],
        0,
        1,
    )
    residual = offset[None] - alpha[..., None] * directions[:, None, None, :]  # [colours, H, W, 3]
    distance = np.where(visible[:, None, None], (residual**2).sum(axis=-1), np.inf)
    return alpha, distance.argmin(axis=0)


def _objects(
    alpha: Floats, nearest: NDArray[np.int64], vocabulary: Vocabulary, passes: int
) -> Analysis:
    size = alpha.shape[1]
    labels = np.zeros((size, size), dtype=int)
    colour_of: list[int] = []
    for colour in range(len(vocabulary.colours)):
        mask = (nearest == colour) & (alpha[colour] >= FOREGROUND)
        if mask.any():
            found, count = ndimage.label(mask, EIGHT_NEIGHBOURS)
            labels[mask] = found[mask] + len(colour_of)
            colour_of += [colour] * count
    if not colour_of:
        return Analysis((), 0.0)
    # every pixel belongs to the blob nearest to it, so the soft edges of neighbours do not mix
    distance, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    owner = np.where(distance <= MARGIN, labels[rows, columns], 0)
    objects, clutter = [], 0.0
    canvas = _Canvas(vocabulary, passes, size)
    for label, window in enumerate(ndimage.find_objects(owner), start=1):
        colour = colour_of[label - 1]
        region = owner[window] == label
        blob = _Blob(
            window, region, labels[window] == label, np.where(region, alpha[colour][window], 0.0)
        )
        item = _recognise(blob, vocabulary.colours[colour], canvas)
        if item is None:
            clutter += float(blob.hard.sum())
        else:
            objects.append(item)
    return Analysis(tuple(sorted(objects, key=lambda item: -item.iou)), clutter)


@dataclass(frozen=True)
class _Canvas:
    """What all blobs of an image share: the shapes and colours it may show, its blur, its side."""

    vocabulary: Vocabulary
    passes: int
    size: int


@dataclass(frozen=True)
class _Blob:
    """Arrays [h, w] of `window`: the pixels nearest to the blob, its own pixels, and its colour's
    coverage of them.
    """

    window: tuple[slice, slice]
    region: NDArray[np.bool_]
    hard: NDArray[np.bool_]
    soft: Floats


def _recognise(blob: _Blob, colour: str, canvas: _Canvas) -> Found | None:
    """The shape of one blob, None where it is too small, too faint or like no shape."""
    plateau = float(np.percentile(blob.soft[blob.hard], PLATEAU_PERCENTILE))
    # a pale blob is a faint object, or a small one whose peak the blur took away: both are tried
    contrasts = [1.0] + ([plateau] if LEAST_PLATEAU <= plateau < FULL_PLATEAU else [])
    fits = [_fit(np.minimum(blob.soft / contrast, 1.0), blob, canvas) for contrast in contrasts]
    iou, shape, area, x, y = max(fits)
    if iou < ACCEPT_IOU:
        return None
    top, left = blob.window[0].start, blob.window[1].start
    rows, columns = np.nonzero(blob.hard)
    box = (
        left + int(columns.min()),
        top + int(rows.min()),
        left + int(columns.max()) + 1,
        top + int(rows.max()) + 1,
    )
    label = (
        "small" if math.sqrt(area / math.pi) < math.sqrt(SMALL * LARGE) * canvas.size else "large"
    )
    return Found(shape, colour, iou, x, y, area, box, label)


def _fit(soft: Floats, blob: _Blob, canvas: _Canvas) -> tuple[float, str, float, float, float]:
    """(soft IoU, shape, area, x, y) of the best template for the coverage `soft`; IoU 0 where it is
    too small.
    """
    vocabulary = canvas.vocabulary
    area = float(soft.sum())
    if area < LEAST_AREA * disc_area(SMALL, canvas.size):
        return 0.0, "", area, 0.0, 0.0
    top, left = blob.window[0].start, blob.window[1].start
    height, width = soft.shape
    y = top + float(soft.sum(axis=1) @ (np.arange(height) + 0.5)) / area
    x = left + float(soft.sum(axis=0) @ (np.arange(width) + 0.5)) / area
    templates = np.stack(
        [coverage(shape, x, y, area, (top, left, height, width)) for shape in vocabulary.shapes],
        axis=-1,
    )
    templates = binomial_blur(templates, canvas.passes)
    best, best_shape = 0.0, ""
    for extra in range(EXTRA_PASSES + 1):
        if extra:
            templates = binomial_blur(templates, 1)
        overlap = np.minimum(templates, soft[:, :, None])[blob.region].sum(axis=0)
        union = np.maximum(templates, soft[:, :, None])[blob.region].sum(axis=0)
        iou = overlap / union
        if iou.max() > best:
            best, best_shape = float(iou.max()), vocabulary.shapes[int(iou.argmax())]
    return best, best_shape, area, x, y
