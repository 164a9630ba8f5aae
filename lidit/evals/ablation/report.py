"""An ablation as one Markdown page with plots, our figures with intervals beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lidit.evals.ablation.paper import MEANING, PAPER
from lidit.evals.ablation.results import ArmResult, ArmSummary, Comparison, compare, summaries
from lidit.evals.statistics import Interval
from lidit.plots import add_grid, new_figure, save_figure

FEW = 6
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
    _plot_learning(folder / LEARNING_PLOT, results)
    _plot_positions(folder / POSITION_PLOT, arms)
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
    parts += ["## Arms", _arms_table(arms), f"![accuracy while learning]({LEARNING_PLOT})"]
    parts += ["## By position of the segment in the caption", _positions_table(arms)]
    parts.append(f"![accuracy by position]({POSITION_PLOT})")
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
    return {"ours": "our own arm", "layers": "our own arm", "control": "the control"}.get(
        table, f"table {table}"
    )


def _facts_table(facts: Mapping[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    )


def _claims_table(comparisons: Sequence[Comparison], arms: Mapping[str, ArmSummary]) -> str:
    lines = [
        "| table | ordering | paper: T2I-CompBench / DPG | learning | difference | final | "
        "difference | loss gap "
        "| verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        better, worse = one.claim.better, one.claim.worse
        first, second = arms[better], arms[worse]
        lines.append(
            f"| {one.claim.table} | {better} > {worse} | {_paper_pair(better, worse)} | "
            f"{first.learning.value:.3f}, {second.learning.value:.3f} | {_signed(one.learning)} | "
            f"{first.final.value:.3f}, {second.final.value:.3f} | {_signed(one.final)} | "
            f"{_signed(one.gap, 5)} | "
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


def _plot_learning(path: Path, results: Sequence[ArmResult]) -> None:
    figure = new_figure((10, 5), dpi=110)
    curves, bars = figure.subplots(1, 2)
    arms = list(dict.fromkeys(result.arm for result in results))
    for number, arm in enumerate(arms):
        chosen = [result for result in results if result.arm == arm]
        steps = [point.step for point in chosen[0].points]
        # [seeds, points]
        table = np.array([[point.accuracy for point in result.points] for result in chosen])
        style = ("-", "--", ":")[number // 10 % 3]
        (line,) = curves.plot(
            steps, table.mean(axis=0), style, marker="o", markersize=3, linewidth=1.2, label=arm
        )
        if len(chosen) > 1:
            curves.fill_between(
                steps, table.min(axis=0), table.max(axis=0), alpha=0.12, color=line.get_color()
            )
        mean = table.mean(axis=1)  # [seeds]
        bars.barh(number, mean.mean(), color=line.get_color(), alpha=0.6)
        bars.plot(mean, [number] * len(mean), "k|", markersize=9)
    curves.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    curves.set(
        xlabel="step", ylabel="binding accuracy", title="while learning (band: range over seeds)"
    )
    curves.legend(fontsize=7)
    bars.set_yticks(range(len(arms)), arms, fontsize=8)
    bars.invert_yaxis()
    bars.set(xlim=(0.45, 1.0), title="accuracy averaged over training (ticks: seeds)")
    add_grid(curves, bars)
    save_figure(figure, path)


def _plot_positions(path: Path, arms: Mapping[str, ArmSummary]) -> None:
    figure = new_figure((8.5, 4.5), dpi=110)
    axes = figure.add_subplot()
    for number, (name, arm) in enumerate(arms.items()):
        values = [interval.value for interval in arm.by_position]
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot(
            range(1, len(values) + 1),
            values,
            style,
            marker="o",
            markersize=4,
            linewidth=1.2,
            label=name,
        )
    count = max(len(arm.by_position) for arm in arms.values())
    axes.set(xticks=range(1, count + 1), xlabel="segment of the caption", ylabel="binding accuracy")
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    add_grid(axes)
    figure.legend(fontsize=8, loc="outside right center")  # beside the axes: fifteen arms fill them
    save_figure(figure, path)
