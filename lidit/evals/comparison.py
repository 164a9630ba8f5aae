"""Runs side by side as one HTML file that opens offline: same prompts, same seeds, scores, curves.

Everything is inside the page: pictures as data URLs, no script, no font, no address.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lidit.errors import InputError
from lidit.plots import plot_lines

Curve = Sequence[tuple[int, float]]
SMALLEST_SIDE = 96
# parts of the names of scores of which higher is not better
NOT_BETTER_HIGHER = ("floor", "drop", "gap")
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: .8rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.best { font-weight: 600; }
td img { image-rendering: pixelated; display: inline-block; margin: 0 3px 3px 0; }
img.curve { max-width: 100%; }
.differs td { background: #fff7e0; }
p { margin: 0 0 .4em; color: #555; }
"""  # noqa: E501


@dataclass(frozen=True)
class RunPage:
    """One run. `facts`: setting -> value; `scores`: metric -> value; `curves`: metric -> (step,
    value);
    `images`: prompt -> its images, uint8 [H, W, 3], sampled with the same seeds in every run.

    `measured`: metric -> the settings it was measured with; values of different settings are not
    compared. `notes`: what a reader must know of the scores.
    """

    name: str
    facts: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    images: Mapping[str, Sequence[NDArray[np.uint8]]] = field(default_factory=dict)
    measured: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def check_names(names: Sequence[str]) -> None:
    """Raises InputError for fewer than two runs or two runs of one name."""
    if len(names) < 2 or len(set(names)) != len(names):
        raise InputError(
            "a comparison needs two or more runs of different names, found "
            f"{', '.join(names) or 'none'}"
        )


def write_report(
    path: Path, runs: Sequence[RunPage], seeds: Sequence[int], title: str = "Runs side by side"
) -> None:
    """Writes the page. Raises InputError for fewer than two runs or two runs of one name."""
    names = [run.name for run in runs]
    check_names(names)
    sections = [
        _images(runs, seeds),
        _scores(runs),
        _curves(runs),
        _facts(runs),
    ]
    body = "\n".join(section for section in sections if section)
    heading = html.escape(f"{title}: {', '.join(names)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, '
        f'initial-scale=1">\n<title>{heading}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{heading}</h1>\n{body}\n</body>\n</html>\n",
        encoding="utf-8",
    )


def _section(title: str, notes: Sequence[str], head: Sequence[str], rows: Sequence[str]) -> str:
    said = "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)
    if not rows:
        return f"<h2>{title}</h2>\n{said}"
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    table = f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{chr(10).join(rows)}\n</tbody>"
    return f"<h2>{title}</h2>\n{said}\n<table>\n{table}\n</table>"


def _images(runs: Sequence[RunPage], seeds: Sequence[int]) -> str:
    prompts = list(dict.fromkeys(prompt for run in runs for prompt in run.images))
    if not prompts:
        return ""
    rows = []
    for prompt in prompts:
        cells = "".join(
            f"<td>{''.join(map(_picture, run.images.get(prompt, ())))}</td>" for run in runs
        )
        rows.append(f"<tr><td>{html.escape(prompt)}</td>{cells}</tr>")
    note = f"Every run draws every prompt with the seeds {', '.join(map(str, seeds))}."
    return _section(
        "Same prompts, same seeds", [note], ["prompt", *(run.name for run in runs)], rows
    )


def _picture(image: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    height, width = image.shape[:2]
    factor = max(1, -(-SMALLEST_SIDE // width))
    return (
        f'<img src="{_data(buffer.getvalue())}" width="{width * factor}" '
        f'height="{height * factor}" alt="">'
    )


def _data(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _scores(runs: Sequence[RunPage]) -> str:
    known = {name for run in runs for name in run.scores}
    bounds = {
        f"{name}_{end}" for name in known for end in ("low", "high") if f"{name}_low" in known
    }
    rows, apart = [], False
    for name in (
        name
        for name in dict.fromkeys(name for run in runs for name in run.scores)
        if name not in bounds
    ):
        values = [run.scores[name] for run in runs if name in run.scores]
        alike = len({run.measured.get(name) for run in runs if name in run.scores}) == 1
        apart = apart or not alike
        ranked = (
            alike
            and max(values) > min(values)
            and not any(part in name for part in NOT_BETTER_HIGHER)
        )
        cells = ""
        for run in runs:
            best = " best" if ranked and _stands_out(name, run, runs) else ""
            cells += f'<td class="number{best}">{_number(run.scores, name)}</td>'
        rows.append(f"<tr><td>{html.escape(name)}{'' if alike else ' *'}</td>{cells}</tr>")
    notes = [note for run in runs for note in run.notes]
    if rows:
        notes.insert(
            0,
            "The highest score of a row is bold where its interval (95 %) lies above the "
            "others', or where none is "
            "known: then the difference may be chance. Floors are what another true scene would "
            "score.",
        )
    if apart:
        notes.append(
            "* Measured with different settings (see below): these numbers cannot be compared."
        )
    return _section("Scores", notes, ["score", *(run.name for run in runs)], rows) if notes else ""


def _stands_out(name: str, run: RunPage, runs: Sequence[RunPage]) -> bool:
    """Whether the run's score is the highest, and above what chance leaves open to the others."""
    others = [other.scores for other in runs if other is not run and name in other.scores]
    if name not in run.scores or any(other[name] >= run.scores[name] for other in others):
        return False
    low = run.scores.get(f"{name}_low", math.inf)
    return all(low > other.get(f"{name}_high", -math.inf) for other in others)


def _number(scores: Mapping[str, float], name: str) -> str:
    """The value with its interval where it has one; nothing where there is no value."""
    if name not in scores:
        return ""
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    return f"{scores[name]:.3f}" + (
        "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    )


def _facts(runs: Sequence[RunPage]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    rows = []
    for name in names:
        values = [run.facts.get(name, "") for run in runs]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        rows.append(f"<tr{differs}><td>{html.escape(name)}</td>{cells}</tr>")
    note = "Settings that differ are marked."
    return (
        _section("Settings", [note], ["setting", *(run.name for run in runs)], rows) if rows else ""
    )


def _curves(runs: Sequence[RunPage]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    pictures = []
    for name in names:
        curves = {run.name: run.curves[name] for run in runs if run.curves.get(name)}
        if curves:
            label = html.escape(name)
            pictures.append(
                f'<img class="curve" src="{_data(_plot(name, curves))}" alt="{label} of every run">'
            )
    return "<h2>Curves</h2>\n" + "\n".join(pictures) if pictures else ""


def _plot(name: str, curves: Mapping[str, Curve]) -> bytes:
    lines = {}
    for label, points in curves.items():
        steps, values = zip(*sorted(points))
        lines[label] = (steps, values)
    buffer = io.BytesIO()
    plot_lines(buffer, lines, name, size=(8, 3.2))
    return buffer.getvalue()
