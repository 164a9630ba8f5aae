"""Positional bias: how well a segment of a prompt is drawn, by where it stands in the prompt (paper
A.3).

The scene benchmark's lists are scored by our scorer; prompts built from T2I-CompBench's attributes
and nouns are scored by a VQA model outside, whose answers come back through `read_segment_scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lidit.datasets.scenes.scene import list_length
from lidit.errors import InputError
from lidit.evals.records import read_record
from lidit.evals.scenes.evaluation import Evaluation, with_bounds
from lidit.evals.statistics import Interval, bootstrap_columns
from lidit.plots import plot_intervals

QUARTILES = 4


@dataclass(frozen=True)
class PositionalCurve:
    """Mean score of the segments of prompts with `segments` segments, with 95 % intervals over
    prompts.

    `drop` is first minus last: of quartiles where there are four segments or more, else of
    positions. Without bias its interval holds 0.
    """

    segments: int
    prompts: int
    images: int
    by_position: tuple[Interval, ...]
    by_quartile: tuple[Interval, ...]
    drop: Interval

    def named(self) -> dict[str, Interval]:
        """Every interval under the name it has in a tracker."""
        named = {f"position_{i + 1}_of_{self.segments}": v for i, v in enumerate(self.by_position)}
        named |= {f"quartile_{i + 1}": v for i, v in enumerate(self.by_quartile)}
        return named | {"drop": self.drop}

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a tracker: NAME, NAME_low and NAME_high of every interval."""
        return {
            key: value
            for name, v in self.named().items()
            for key, value in with_bounds(name, v).items()
        }


def scene_curves(evaluation: Evaluation) -> dict[str, PositionalCurve]:
    """One curve per list category in an evaluation: a segment scores 1 where its shape is shown in
    its colour.
    """
    curves = {}
    for tag in dict.fromkeys(image.item["tag"] for image in evaluation.images):
        if list_length(tag):
            chosen = [image for image in evaluation.images if image.item["tag"] == tag]
            curves[tag] = positional_curve(
                [image.score.clauses for image in chosen], [image.prompt for image in chosen]
            )
    return curves


def positional_curve(scores: ArrayLike, prompts: Sequence[object]) -> PositionalCurve:
    """The curve of segment scores [images, segments] in [0, 1]; `prompts` [images] says which
    prompt an image is of.

    Segment i of k falls into quartile floor(4 i / k). Raises InputError for scores of another shape
    or range.
    """
    table = np.asarray(scores, dtype=float)
    if table.ndim != 2 or table.shape[1] < 2 or not np.all((table >= 0) & (table <= 1)):
        raise InputError(
            f"segment scores of shape {list(table.shape)}: expected [images, 2 or more] "
            "within 0 and 1"
        )
    count = table.shape[1]
    columns = [table]
    if count >= QUARTILES:
        quartile = np.arange(count) * QUARTILES // count
        columns.append(
            np.stack([table[:, quartile == q].mean(axis=1) for q in range(QUARTILES)], axis=1)
        )
    columns.append(columns[-1][:, :1] - columns[-1][:, -1:])
    intervals = bootstrap_columns(np.concatenate(columns, axis=1), prompts)
    return PositionalCurve(
        segments=count,
        prompts=len({str(prompt) for prompt in prompts}),
        images=len(table),
        by_position=tuple(intervals[:count]),
        by_quartile=tuple(intervals[count:-1]),
        drop=intervals[-1],
    )


def positions_table(curves: Mapping[str, PositionalCurve]) -> str:
    """A Markdown table of curves (label -> curve): a row per position, per quartile, and for the
    drop.
    """
    lines = ["| list | place in the prompt | prompts | images | score |", "|---|---|---|---|---|"]
    for label, curve in curves.items():
        for name, interval in curve.named().items():
            place = name.replace("_", " ")
            if name == "drop":
                place = (
                    f"**drop**, first {'quartile' if curve.by_quartile else 'position'} less last"
                )
            elif name.startswith("quartile") and curve.segments == QUARTILES:
                continue  # the positions themselves
            lines.append(f"| {label} | {place} | {curve.prompts} | {curve.images} | {interval} |")
    return "\n".join(lines)


def read_segment_scores(path: Path) -> tuple[NDArray[np.float64], list[int]]:
    """Scores [images, segments] and prompt numbers from a JSON-lines file of {"prompt": number,
    "scores": [...]}.

    One line per image. Raises InputError naming the file and line that do not fit.
    """
    rows: list[list[float]] = []
    prompts: list[int] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = read_record(line)
            row = [float(score) for score in record["scores"]]
            prompts.append(int(record["prompt"]))
        except (ValueError, KeyError, TypeError, OverflowError):
            raise InputError(
                f'{path}:{number}: expected {{"prompt": number, "scores": [number, ...]}}'
            ) from None
        if rows and len(row) != len(rows[0]):
            raise InputError(
                f"{path}:{number}: {len(row)} scores, {len(rows[0])} in the lines before"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: empty; expected one JSON line per image")
    return np.array(rows), prompts


def plot_curves(
    path: Path,
    curves: Mapping[str, PositionalCurve],
    title: str = "Score by position in the prompt",
) -> None:
    """Writes the curves (label -> curve) with their intervals as a PNG; x is the relative position
    in [0, 1].

    The legend says the drop and its interval, which decide whether there is a bias.
    """
    if not curves:
        raise InputError("no positional curves to plot: evaluate list4 or list8 prompts")
    plot_intervals(path, plot_labels(curves), "score", title)


def plot_labels(curves: Mapping[str, PositionalCurve]) -> dict[str, tuple[Interval, ...]]:
    """What the plot's legend says of each curve -> the curve's points."""
    return {
        f"{label} ({c.prompts} prompts), drop {c.drop}": c.by_position
        for label, c in curves.items()
    }
