"""What people look at: labelled grids of images and curves, as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LABEL_LINES, LINE_HEIGHT, MARGIN = 3, 13, 6
SMALLEST_CELL = 128
RIGHT, WRONG = (30, 150, 60), (210, 50, 40)


def labelled_grid(
    images: Sequence[NDArray[np.uint8]], labels: Sequence[str], columns: int = 6, right: Sequence[bool] | None = None
) -> Image.Image:
    """Images [H, W, 3] in rows of `columns`, each with its label below. Small images are enlarged by whole factors.

    `right`, one per image, frames it green (True) or red (False).
    """
    if len(images) != len(labels) or not images:
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    factor = max(1, -(-SMALLEST_CELL // width))
    cell = (width * factor + MARGIN, height * factor + LABEL_LINES * LINE_HEIGHT + MARGIN)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    drawing, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    letters = max(8, int(width * factor / 5.6))
    for index, (image, label) in enumerate(zip(images, labels)):
        left = MARGIN + index % columns * cell[0]
        top = MARGIN + index // columns * cell[1]
        picture = Image.fromarray(image).resize(
            (image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.NEAREST
        )
        grid.paste(picture, (left, top))
        if right is not None:
            frame = (left - 2, top - 2, left + picture.width + 1, top + picture.height + 1)
            drawing.rectangle(frame, outline=RIGHT if right[index] else WRONG, width=2)
        lines = textwrap.wrap(label, letters, max_lines=LABEL_LINES, placeholder=" ...")
        drawing.text((left, top + height * factor + 2), "\n".join(lines), fill="black", font=font, spacing=1)
    return grid


def curves(path: Path, title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], y: str) -> None:
    """Lines of (x, y) values with a legend, written to `path`; logarithmic where all values are positive."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, (steps, values) in series.items():
        axes.plot(steps, values, label=name, linewidth=1)
    positive = [value for _, values in series.values() for value in values]
    if positive and min(positive) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(y)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": ""})
    pyplot.close(figure)
