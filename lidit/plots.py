"""The one style of every figure: font, sizes, colours that colour-blind readers tell apart, labels
beside the lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, dark enough for thin lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5195", "#E69F00", "#56B4E9", "#333333")
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
DPI = 120
LABEL_GAP = 0.055  # of the axes' height, between two labels


def new_figure(size: tuple[float, float], dpi: int = DPI) -> Figure:
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


def new_panels(
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row, in our style.

    The style is set while the axes are made, so whoever plots beside us keeps theirs.
    """
    import matplotlib
    from cycler import cycler

    figure = new_figure(size)
    style: Any = {**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        found = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    axes = list(found.flat)
    for each in axes:
        each.tick_params(labelsize=STYLE["xtick.labelsize"], colors=STYLE["xtick.color"], length=3)
    return figure, axes


def save_figure(figure: Figure, target: Path | BytesIO) -> None:
    """Write the figure as PNG, without the name of the program in it; the folder of `target` is
    made.
    """
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png", metadata={"Software": ""})


def set_title(axes: Axes, text: str) -> None:
    """What the panel shows, above its left end."""
    axes.set_title(text, loc="left", fontsize=STYLE["axes.titlesize"], fontweight="bold")


def label_lines(axes: Axes) -> None:
    """Write each line's label at its right end, in its colour: no legend over the data. Call it
    last.
    """
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    ends = []
    for line in lines:
        if not np.size(line.get_xdata()):
            continue
        x, y = (np.asarray(values, float)[-1] for values in (line.get_xdata(), line.get_ydata()))
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        ends.append((float(height), line))
    ends.sort(key=lambda end: end[0])
    # Upwards, each at least a label's height above the one below; then down again from the top,
    # where the title is.
    places, lowest = [], -np.inf
    for height, _ in ends:
        places.append(max(height, lowest))
        lowest = places[-1] + LABEL_GAP
    highest = 1.0
    for at in reversed(range(len(places))):
        places[at] = min(places[at], highest)
        highest = places[at] - LABEL_GAP
    for place, (_, line) in zip(places, ends, strict=True):
        axes.annotate(
            str(line.get_label()), (1.0, place), xycoords="axes fraction", xytext=(5, 0),
            textcoords="offset points",
            color=line.get_color(), fontsize=8, va="center", annotation_clip=False,
        )  # fmt: skip


Line = tuple[Sequence[float], Sequence[float]]  # x and y values


def plot_lines(
    target: Path | BytesIO,
    series: Mapping[str, Line],
    y_label: str,
    title: str = "",
    size: tuple[float, float] = (8, 4.5),
) -> None:
    """Lines over training steps as a PNG; logarithmic where all values are positive."""
    figure, (axes,) = new_panels(size)
    for name, (steps, values) in series.items():
        axes.plot(steps, values, label=name)
    positive = [value for _, values in series.values() for value in values]
    if positive and min(positive) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel=y_label)
    set_title(axes, title)
    label_lines(axes)
    save_figure(figure, target)


class Bounded(Protocol):
    """A value with the ends of its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def draw_intervals(
    axes: Axes, label: str, intervals: Sequence[Bounded], x: Sequence[float], colour: str
) -> None:
    """A line through values with their intervals."""
    y = np.array([interval.value for interval in intervals])
    below = np.maximum(0, y - np.array([interval.low for interval in intervals]))
    above = np.maximum(0, np.array([interval.high for interval in intervals]) - y)
    axes.errorbar(
        x, y, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=1, capsize=2, alpha=0.6
    )
    axes.plot(x, y, marker="o", color=colour, label=label)


def plot_intervals(
    path: Path, series: Mapping[str, Sequence[Bounded]], y_label: str, title: str
) -> None:
    """Values by position (label -> an interval per segment) as a PNG; x is the relative position in
    [0, 1].
    """
    figure, (axes,) = new_panels((6, 4))
    for number, (label, intervals) in enumerate(series.items()):
        x = ((np.arange(len(intervals)) + 0.5) / len(intervals)).tolist()
        draw_intervals(axes, label, intervals, x, COLOURS[number % len(COLOURS)])
    axes.set(
        xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="relative position of the segment", ylabel=y_label
    )
    set_title(axes, title)
    label_lines(axes)
    save_figure(figure, path)
