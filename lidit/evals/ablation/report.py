"""An ablation as one Markdown page with plots, our figures with intervals beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lidit.evals.ablation.paper import CLAIMS, MEANING, PAPER
from lidit.evals.ablation.results import ArmResult, ArmSummary, Comparison, compare, summaries
from lidit.evals.statistics import Interval
from lidit.plots import COLOURS, draw_intervals, label_lines, new_panels, save_figure, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 6
LEAST_POSITIONS = 3
OTHERS = "others"
# Table of the paper -> what its panel shows.
TITLES = {
    "2": "Table 2: instruction, refiner, two LLMs",
    "3": "Table 3: causal mask, encoders",
    "5": "Table 5: the refiner's depth and gates",
    "6": "Table 6: how two LLMs are fused",
    "layers": "Layers of the LLM that are read",
    "ours": "Ours: what the refiner's mixing gives",
    "control": "Control: what only a refiner can carry",
    OTHERS: "Arms that the paper does not compare",
}
PAGE, LEARNING_PLOT, POSITION_PLOT = "README.md", "learning.png", "positions.png"
INTRODUCTION = """\
Every arm has the same scenes, steps, data order and seeds; only encoders and model differ. An arm is judged on scenes
it has never seen, without sampling: is the loss higher under a caption that is wrong in one thing (chance .5)?
`learning` is that accuracy averaged over the points of training, `final` the one at the end; brackets are 95 %
intervals over seeds (Student's t), and differences are paired by seed. A verdict goes by `learning`, as arms that all
learn differ in how fast; the control's by `final`, as it asks what can be learned at all. The paper's figures are image
scores of models about a thousand times larger: only orderings can be compared, never values."""  # noqa: E501


def write_ablation_report(
    folder: Path,
    results: Sequence[ArmResult],
    title: str,
    facts: Mapping[str, str],
    missing: Sequence[str] = (),
) -> Path:
    """Writes README.md and two plots into `folder`; returns the page. `facts`: what was run, name
    -> words;
    `missing`: arms without a result yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arms, comparisons = summaries(results), compare(results)
    plot_learning(folder / LEARNING_PLOT, arms)
    curved = plot_positions(folder / POSITION_PLOT, arms)
    parts = [f"# {title}", INTRODUCTION, _facts_table(facts)]
    if missing:
        shown = f"{', '.join(missing[:FEW])}{' and others' if len(missing) > FEW else ''}"
        total = len(results) + len(missing)
        parts.append(
            f"{len(missing)} of {total} trainings were not finished when this page was "
            f"written: {shown}."
        )
    parts += [
        "## Which of the paper's orderings hold here",
        words(comparisons),
        _claims_table(comparisons, arms),
    ]
    parts += [
        "## Arms",
        _arms_table(arms),
        f"![accuracy over training and at its end]({LEARNING_PLOT})",
    ]
    parts += ["## By position of the segment in the caption", _positions_table(arms)]
    parts += [f"![accuracy by position]({POSITION_PLOT})"] if curved else []
    page = folder / PAGE
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def words(comparisons: Sequence[Comparison]) -> str:
    """Which orderings hold, which do not, which the data cannot tell; in sentences."""
    if not comparisons:
        return "No two arms of this recipe are compared by the paper."
    lines = []
    for verdict, lead in (
        ("holds", "**Hold**"),
        ("does not hold", "**Do not hold** (the order is the other way round)"),
        ("cannot be told", "**Cannot be told** from this data (the interval holds zero)"),
    ):
        chosen = [c for c in comparisons if c.verdict == verdict]
        named = "; ".join(f"{c.claim.better} > {c.claim.worse} ({_source(c)})" for c in chosen)
        lines.append(f"- {lead}: {named or 'none'}.")
    saturated = [f"{c.claim.better} / {c.claim.worse}" for c in comparisons if c.saturated]
    if saturated:
        lines.append(
            "- Both arms end at an accuracy above .97, so only their speed of learning is "
            "compared: "
            f"{'; '.join(saturated)}."
        )
    told = [c for c in comparisons if not math.isinf(c.learning.low)]
    if told:
        lines.append(
            f"- {len(told)} orderings are looked at, each with a 95 % interval: were there no "
            "differences at all, "
            f"{len(told) / 20:.1f} of them would be expected to hold or not to hold by chance. "
            "All arms are judged on "
            "the same scenes, so the intervals say what other seeds would change, not what "
            "other scenes would."
        )
    single = [c for c in comparisons if math.isinf(c.learning.low)]
    if single:
        lines.append("- One seed has no interval: nothing can be told before there are two.")
    return "\n".join(lines)


def _source(comparison: Comparison) -> str:
    table = comparison.claim.table
    own = dict.fromkeys(("ours", "layers", "storage"), "our own arm")
    return {**own, "control": "the control"}.get(table, f"table {table}")


def _facts_table(facts: Mapping[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    )


def _claims_table(comparisons: Sequence[Comparison], arms: Mapping[str, ArmSummary]) -> str:
    lines = [
        "| table | ordering | paper: T2I-CompBench / DPG | learning | difference | final | "
        "difference | loss gap | validation loss "
        "| verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        better, worse = one.claim.better, one.claim.worse
        first, second = arms[better], arms[worse]
        lines.append(
            f"| {one.claim.table} | {better} > {worse} | {_paper_pair(better, worse)} | "
            f"{first.learning.value:.3f}, {second.learning.value:.3f} | {_signed(one.learning)} | "
            f"{first.final.value:.3f}, {second.final.value:.3f} | {_signed(one.final)} | "
            f"{_signed(one.gap, 5)} | {_signed(one.loss, 5)} | "
            f"**{one.verdict}**{' (by final)' if one.claim.by == 'final' else ''} |"
        )
    return "\n".join(lines)


def _paper_pair(better: str, worse: str) -> str:
    first, second = PAPER.get(better), PAPER.get(worse)
    if first is None or second is None:
        return "not in the paper"
    text = f"{first[0]:.2f} > {second[0]:.2f}"
    return (
        text
        if first[1] is None or second[1] is None
        else f"{text} / {first[1]:.2f} > {second[1]:.2f}"
    )


def _signed(interval: Interval, digits: int = 3) -> str:
    if math.isinf(interval.low):
        return f"{interval.value:+.{digits}f} (one seed)"
    return f"{interval.value:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _plain(interval: Interval, digits: int = 3) -> str:
    if math.isinf(interval.low):
        return f"{interval.value:.{digits}f}"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _arms_table(arms: Mapping[str, ArmSummary]) -> str:
    lines = [
        "| arm | what | parameters | seeds | learning | final | final loss gap | validation "
        "loss | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        paper = PAPER.get(name)
        figures = (
            ""
            if paper is None
            else " / ".join(f"{value:.2f}" for value in paper if value is not None)
        )
        lines.append(
            f"| {name} | {MEANING.get(name, '')} | {arm.parameters / 1e6:.2f}M | {arm.seeds} | "
            f"{_plain(arm.learning)} "
            f"| {_plain(arm.final)} | {_plain(arm.gap, 5)} | {_plain(arm.validation_loss, 4)} | "
            f"{figures} |"
        )
    return "\n".join(lines)


def _positions_table(arms: Mapping[str, ArmSummary]) -> str:
    count = max(len(arm.by_position) for arm in arms.values())
    head = " | ".join(f"segment {i + 1}" for i in range(count))
    lines = [
        "Accuracy of the cases whose error is in the segment, mean over the points of training. "
        "`drop`: first minus "
        "last segment; the paper's positional bias is a drop above zero.\n",
        f"| arm | {head} | drop |",
        "|---" * (count + 2) + "|",
    ]
    for name, arm in arms.items():
        cells = " | ".join(_plain(interval, 2) for interval in arm.by_position)
        lines.append(f"| {name} | {cells} | {_signed(arm.drop, 2)} |")
    return "\n".join(lines)


def plot_learning(path: Path, arms: Mapping[str, ArmSummary]) -> None:
    """A panel per table of the paper: accuracy over training (dots) and at its end (rings), with
    intervals.
    """
    panels = _by_table(arms)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(len(shown) for shown in panels.values())
    figure, every = new_panels(
        (max(6.5, 4.2 * columns), (0.34 * tallest + 1.1) * rows), rows, columns, sharex=True
    )
    for axes, (table, shown) in zip(every, panels.items()):
        shown = sorted(shown, key=lambda name: arms[name].learning.value)
        for place, name in enumerate(shown):
            for interval, shift, filled in (
                (arms[name].learning, 0.12, True),
                (arms[name].final, -0.12, False),
            ):
                _dot(axes, interval, place + shift, filled)
        axes.axvline(0.5, color="#555555", linewidth=0.9, linestyle=":")
        axes.set_yticks(range(len(shown)), shown)
        axes.set(xlim=(0.38, 1.02), ylim=(-0.6, len(shown) - 0.4))
        set_title(axes, TITLES.get(table, f"Table {table}"))
    for place, axes in enumerate(every):
        axes.tick_params(labelbottom=place + columns >= len(panels))  # nothing is below it
        if place >= len(panels):
            axes.set_axis_off()
    figure.supxlabel(
        "binding accuracy, chance .5 (dots: over training; rings: at its end; lines: 95 % "
        "intervals)",
        fontsize=9,
    )
    save_figure(figure, path)


def _by_table(arms: Mapping[str, ArmSummary]) -> dict[str, list[str]]:
    """Table of the paper -> the arms that it compares, as far as there are results; then the arms
    of no table.
    """
    found: dict[str, list[str]] = {}
    for claim in CLAIMS:
        for name in (claim.better, claim.worse):
            if name in arms and name not in found.setdefault(claim.table, []):
                found[claim.table].append(name)
    shown = {name for names in found.values() if len(names) > 1 for name in names}
    others = [name for name in arms if name not in shown]
    return {table: names for table, names in found.items() if len(names) > 1} | (
        {OTHERS: others} if others else {}
    )


def _dot(axes: Axes, interval: Interval, place: float, filled: bool) -> None:
    colour = COLOURS[0] if filled else COLOURS[1]
    if not math.isinf(interval.low):
        axes.plot(
            [interval.low, interval.high], [place, place], color=colour, linewidth=1.2, alpha=0.7
        )
    face = colour if filled else "white"
    axes.plot(
        [interval.value], [place], marker="o", color=colour, markerfacecolor=face, markersize=5
    )


def plot_positions(path: Path, arms: Mapping[str, ArmSummary]) -> bool:
    """A panel per table: accuracy by the segment that is wrong, with intervals. False where nothing
    is plotted: two segments make no curve.
    """
    count = max(len(arm.by_position) for arm in arms.values())
    panels = _by_table(arms)
    if count < LEAST_POSITIONS:
        return False
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, every = new_panels((4.8 * columns, 2.9 * rows), rows, columns, sharey=True)
    for axes, (table, shown) in zip(every, panels.items()):
        for number, name in enumerate(shown):
            x = (
                np.arange(1, count + 1) + (number - len(shown) / 2) * 0.04
            )  # side by side, not on top of each other
            draw_intervals(
                axes, name, arms[name].by_position, x.tolist(), COLOURS[number % len(COLOURS)]
            )
        axes.axhline(0.5, color="#555555", linewidth=0.9, linestyle=":")
        axes.set(xticks=range(1, count + 1), ylim=(0.3, 1.02))
        set_title(axes, TITLES.get(table, f"Table {table}"))
        label_lines(axes)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("segment of the caption that is wrong", fontsize=9)
    figure.supylabel("binding accuracy", fontsize=9)
    save_figure(figure, path)
    return True
