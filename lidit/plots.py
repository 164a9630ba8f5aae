"""What people look at: labelled grids of images, and the frame of every figure, as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_LINES, LINE_HEIGHT, MARGIN = 3, 13, 6
SMALLEST_CELL = 128
RIGHT, WRONG = (30, 150, 60), (210, 50, 40)


def labelled_grid(
    images: Sequence[NDArray[np.uint8] | Image.Image],
    labels: Sequence[str],
    columns: int = 6,
    right: Sequence[bool] | None = None,
) -> Image.Image:
    """Images, or arrays [H, W, 3], in rows of `columns`, each with its label below.

    Small images are enlarged by whole factors.

    `right`, one per image, frames it green (True) or red (False).
    """
    if len(images) != len(labels) or not images:
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    arrays = [np.asarray(image) for image in images]
    height, width = (max(image.shape[axis] for image in arrays) for axis in (0, 1))
    factor = max(1, -(-SMALLEST_CELL // width))
    cell = (width * factor + MARGIN, height * factor + LABEL_LINES * LINE_HEIGHT + MARGIN)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    drawing, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    letters = max(8, int(width * factor / 5.6))
    for index, (image, label) in enumerate(zip(arrays, labels)):
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
        drawing.text(
            (left, top + height * factor + 2), "\n".join(lines), fill="black", font=font, spacing=1
        )
    return grid


def new_figure(size: tuple[float, float], dpi: int = 100) -> Figure:
    """An empty figure of `size` inches. It belongs to no window and is not among pyplot's global
    figures.
    """
    # matplotlib takes half a second to import, and workers that only need labelled grids never
    # plot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, target: Path | BytesIO) -> None:
    """Write the figure as PNG, without the name of the program in it; the folder of `target` is
    made.
    """
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", metadata={"Software": ""})


def add_grid(*every: Axes) -> None:
    """The faint grid that all our axes have."""
    for axes in every:
        axes.grid(alpha=0.3)


Line = tuple[Sequence[float], Sequence[float]]  # x and y values


def plot_lines(
    target: Path | BytesIO,
    series: Mapping[str, Line],
    y_label: str,
    title: str = "",
    size: tuple[float, float] = (8, 4.5),
) -> None:
    """Lines over training steps with a legend, as a PNG; logarithmic where all
    values are positive.
    """
    figure = new_figure(size, dpi=120)
    axes = figure.add_subplot()
    for name, (steps, values) in series.items():
        axes.plot(steps, values, label=name, linewidth=1)
    positive = [value for _, values in series.values() for value in values]
    if positive and min(positive) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=y_label, title=title)
    add_grid(axes)
    axes.legend()
    save_figure(figure, target)


class Bounded(Protocol):
    """A value with the ends of its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def plot_intervals(
    path: Path, series: Mapping[str, Sequence[Bounded]], y_label: str, title: str
) -> None:
    """Values by position (label -> an interval per segment) as a PNG; x is the relative position in
    [0, 1].
    """
    figure = new_figure((6, 4), dpi=120)
    axes = figure.add_subplot()
    for label, intervals in series.items():
        x = (np.arange(len(intervals)) + 0.5) / len(intervals)
        y = np.array([interval.value for interval in intervals])
        low = np.array([interval.low for interval in intervals])
        high = np.array([interval.high for interval in intervals])
        axes.errorbar(x, y, yerr=[y - low, high - y], marker="o", capsize=3, label=label)
    axes.set(
        xlim=(0, 1),
        ylim=(-0.02, 1.02),
        xlabel="relative position of the segment",
        ylabel=y_label,
        title=title,
    )
    add_grid(axes)
    axes.legend()
    save_figure(figure, path)
