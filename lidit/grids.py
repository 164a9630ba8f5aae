"""Labelled grids of images: every picture under its prompt, right and wrong told by more than
colour.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LABEL_LINES, LINE_HEIGHT, MARGIN = 3, 15, 8
HEADING_HEIGHT = 22
SMALLEST_CELL = 128
FONT_SIZE, HEADING_SIZE = 12, 13
BADGE = 16  # pixels, of the mark in a picture's corner
# Bluish green and vermillion: told apart by everybody, and the marks differ in shape besides.
RIGHT, WRONG = (0, 158, 115), (213, 94, 0)


def labelled_grid(
    images: Sequence[NDArray[np.uint8] | Image.Image],
    labels: Sequence[str],
    columns: int = 6,
    right: Sequence[bool] | None = None,
    headings: Sequence[str] = (),
) -> Image.Image:
    """Images, or arrays [H, W, 3], in rows of `columns`, each with its label below.

    Small images are enlarged by whole factors.

    `right`, one per image, frames it with a tick (True) or a cross (False). `headings`: a line
    above each row.
    """
    if len(images) != len(labels) or not images:
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    arrays = [np.asarray(image) for image in images]
    height, width = (max(image.shape[axis] for image in arrays) for axis in (0, 1))
    factor = max(1, -(-SMALLEST_CELL // width))
    above = HEADING_HEIGHT if headings else 0
    cell = (width * factor + MARGIN, above + height * factor + LABEL_LINES * LINE_HEIGHT + MARGIN)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    drawing = ImageDraw.Draw(grid)
    for row, heading in enumerate(headings):
        drawing.text(
            (MARGIN, MARGIN + row * cell[1] + 1),
            heading,
            fill="#222222",
            font=font(HEADING_SIZE, bold=True),
        )
    for index, (image, label) in enumerate(zip(arrays, labels)):
        left = MARGIN + index % columns * cell[0]
        top = MARGIN + index // columns * cell[1] + above
        picture = Image.fromarray(image).resize(
            (image.shape[1] * factor, image.shape[0] * factor), Image.Resampling.NEAREST
        )
        grid.paste(picture, (left, top))
        if right is not None:
            _mark(drawing, (left, top, left + picture.width, top + picture.height), right[index])
        lines = _wrapped(label, width * factor)
        drawing.text(
            (left, top + height * factor + 4),
            lines,
            fill="#222222",
            font=font(FONT_SIZE),
            spacing=2,
        )
    return grid


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of our figures, out of matplotlib's folder; Pillow's own where that is not
    installed.
    """
    spec = find_spec("matplotlib")
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(spec.origin).parent / "mpl-data/fonts/ttf" / name if spec and spec.origin else None
    return (
        ImageFont.truetype(str(path), size)
        if path and path.is_file()
        else ImageFont.load_default(size=size)
    )


def _wrapped(label: str, width: int) -> str:
    """The label in lines that are at most `width` pixels wide, as far as whole words allow."""
    letters = max(8, width // 6)
    while letters > 8:
        lines = textwrap.wrap(label, letters, max_lines=LABEL_LINES, placeholder=" ...")
        if all(font(FONT_SIZE).getlength(line) <= width for line in lines):
            break
        letters -= 1
    return "\n".join(textwrap.wrap(label, letters, max_lines=LABEL_LINES, placeholder=" ..."))


def _mark(drawing: ImageDraw.ImageDraw, box: tuple[int, int, int, int], right: bool) -> None:
    """A frame, and in its lower right corner a round tick or a square cross."""
    left, top, end, bottom = box
    colour = RIGHT if right else WRONG
    drawing.rectangle((left - 2, top - 2, end + 1, bottom + 1), outline=colour, width=3)
    corner = (end - BADGE, bottom - BADGE, end, bottom)
    x, y = corner[:2]
    if right:
        drawing.ellipse(corner, fill=colour)
        drawing.line([(x + 4, y + 8), (x + 7, y + 11), (x + 12, y + 5)], fill="white", width=2)
    else:
        drawing.rectangle(corner, fill=colour)
        drawing.line([(x + 4, y + 4), (x + 12, y + 12)], fill="white", width=2)
        drawing.line([(x + 4, y + 12), (x + 12, y + 4)], fill="white", width=2)
