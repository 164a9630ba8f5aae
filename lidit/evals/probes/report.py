"""The study of the states as a Markdown page with plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lidit.evals.probes.probe import QUESTIONS, ProbeResult, chance
from lidit.plots import label_lines, new_panels, save_figure, set_title

ACCURACY_PLOT, NORMS_PLOT = "accuracy.png", "norms.png"
THIRD_TO_LAST = -3
# by how far a probe is above guessing
HELD = (
    (0.05, "holds nothing of"),
    (0.3, "holds little of"),
    (0.7, "holds part of"),
    (1.0, "holds"),
)
STYLE_WORDS = {
    "bare": "attributes before their nouns (`a red circle, a blue square, ...`)",
    "clauses": "attributes in later clauses (`a circle, a square, ...; the square is blue, the "
    "circle is red, ...`)",
    "ordinals": "attributes in a later sentence, by number (`... the first is red, the second is "
    "blue.`)",
    "sentences": "attributes in sentences of their own, in any order",
    "long": "long prose: objects, then their places, then their attributes",
    "long_before": "long prose with the attributes before their nouns",
}
INTRODUCTION = """\
Can a linear probe read what a prompt says from the frozen states of its tokens, and from which token? Captions name
four objects of different shapes and colours. A probe is ridge regression of one token's standardised state on the
wanted word, one probe per segment, judged on the quarter of the captions it was not fitted to. Guessing gives
{colour:.2f} for a colour and {shape:.2f} for a shape; who knows only which four colours occur reaches .25, and who
counts off the shapes named before reaches .52 on average. "Third-to-last" is the block whose states the paper uses."""  # noqa: E501


def write_probe_report(folder: Path, results: Sequence[ProbeResult], title: str) -> Path:
    """Writes README.md, accuracy.png and norms.png into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    _plot_accuracy(folder / ACCURACY_PLOT, results)
    _plot_norms(folder / NORMS_PLOT, results)
    first = next(iter(QUESTIONS))
    introduction = INTRODUCTION.format(
        colour=chance(first), shape=chance("shape at its colour word")
    )
    parts = [f"# {title}", introduction, "## What was found", "\n".join(findings(results))]
    for style in _styles(results):
        chosen = [result for result in results if result.style == style]
        tokens = ", ".join(sorted({f"{result.tokens:.0f}" for result in chosen}))
        words = f"{STYLE_WORDS.get(style, '')}; {chosen[0].captions} captions of {tokens} tokens"
        parts += [f"## Captions `{style}`", words, _accuracy_table(chosen), _position_table(chosen)]
    parts += [
        f"![accuracy by block]({ACCURACY_PLOT})",
        "## Norms and outlier channels",
        _norm_table(results),
    ]
    parts.append(f"![norms by block]({NORMS_PLOT})")
    page = folder / "README.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def findings(results: Sequence[ProbeResult]) -> list[str]:
    """One line per style and LLM setting: where the colour of a segment can be read at the
    third-to-last block.
    """
    lines = []
    for result in results:
        at = {question: float(_at(result, question).mean()) for question in QUESTIONS}
        guess = chance("colour at its noun")
        noun = at["colour at its noun"]
        held = next(words for limit, words in HELD if noun - guess < limit)
        positions = _at(result, "colour at the last token")
        lines.append(
            f"- {result.encoder}, `{result.style}`: a noun's state {held} its colour "
            f"({noun:.2f}); the colour word "
            f"holds the shape at {at['shape at its colour word']:.2f}; the last token tells the "
            "first segment's "
            f"colour at {positions[0]:.2f} and the last one's at {positions[-1]:.2f}."
        )
    return lines


def metrics(results: Sequence[ProbeResult]) -> dict[str, float]:
    """Flat numbers for a tracker: mean over segments at the third-to-last block."""
    return {
        f"{result.encoder.replace(',', '')}/{result.style}/{question}": float(
            _at(result, question).mean()
        )
        for result in results
        for question in QUESTIONS
    }


def _at(result: ProbeResult, question: str, block: int = THIRD_TO_LAST) -> np.ndarray:
    """Accuracy per segment [K] at one block."""
    table = result.accuracy[question]
    return np.asarray(table[max(block, -len(table))])


def _styles(results: Sequence[ProbeResult]) -> list[str]:
    return list(dict.fromkeys(result.style for result in results))


def _accuracy_table(results: Sequence[ProbeResult]) -> str:
    lines = [
        "Accuracy at the third-to-last block, and in brackets the best block of all; mean over "
        "the four segments.\n",
        f"| states | {' | '.join(QUESTIONS)} |",
        "|---" * (len(QUESTIONS) + 1) + "|",
    ]
    for result in results:
        cells = []
        for question in QUESTIONS:
            by_block = result.accuracy[question].mean(axis=1)
            best = int(by_block.argmax())
            cells.append(f"{_at(result, question).mean():.2f} ({by_block[best]:.2f} at {best + 1})")
        lines.append(f"| {result.encoder} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _position_table(results: Sequence[ProbeResult]) -> str:
    asked = ("colour at its noun", "colour at the last token")
    count = results[0].accuracy[asked[0]].shape[1]
    head = " | ".join(f"{question}, segment {k + 1}" for question in asked for k in range(count))
    lines = [
        "By segment, third-to-last block.\n",
        f"| states | {head} |",
        "|---" * (len(asked) * count + 1) + "|",
    ]
    for result in results:
        cells = " | ".join(f"{value:.2f}" for question in asked for value in _at(result, question))
        lines.append(f"| {result.encoder} | {cells} |")
    return "\n".join(lines)


def _norm_table(results: Sequence[ProbeResult]) -> str:
    lines = [
        "Caption tokens: mean norm, share of the squared norm in the strongest channel, number "
        "of outlier channels "
        "(root mean square over ten times the median channel's); and the norm of the very first "
        "token, the attention "
        "sink, which no caption token should be.\n",
        "| states | block | norm | strongest channel | outlier channels | first token's norm |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        if result.style != results[0].style:
            continue
        blocks = len(result.layers)
        for block in sorted({0, blocks // 2, max(blocks + THIRD_TO_LAST, 0), blocks - 1}):
            facts = result.layers[block]
            sink = "" if facts.sink_norm is None else f"{facts.sink_norm:.0f}"
            lines.append(
                f"| {result.encoder} | {block + 1} of {blocks} | {facts.norm:.0f} | "
                f"{facts.strongest_share:.0%} "
                f"| {facts.outliers} | {sink} |"
            )
    return "\n".join(lines)


def _plot_accuracy(path: Path, results: Sequence[ProbeResult]) -> None:
    # Style by style, a panel per question, in two columns: each is wide enough to be read.
    panels = [(style, question) for style in _styles(results) for question in QUESTIONS]
    rows = -(-len(panels) // 2)
    figure, every = new_panels((9, 2.4 * rows + 1.2), rows, 2, sharex=True, sharey=True)
    for axes, (style, question) in zip(every, panels):
        for result in (result for result in results if result.style == style):
            values = result.accuracy[question].mean(axis=1)
            axes.plot((np.arange(len(values)) + 1) / len(values), values, label=result.encoder)
        axes.axhline(chance(question), color="#555555", linewidth=0.9, linestyle=":")
        axes.set(ylim=(0, 1.03))
        set_title(axes, f"{question}, {style}")
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("depth of the block; dotted: chance", fontsize=9)
    figure.supylabel("probe accuracy", fontsize=9)
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    save_figure(figure, path)


def _plot_norms(path: Path, results: Sequence[ProbeResult]) -> None:
    figure, (norms, shares) = new_panels((11, 4), columns=2)
    for result in (result for result in results if result.style == results[0].style):
        depth = (np.arange(len(result.layers)) + 1) / len(result.layers)
        (line,) = norms.plot(depth, [facts.norm for facts in result.layers], label=result.encoder)
        sinks = [facts.sink_norm for facts in result.layers if facts.sink_norm is not None]
        if len(sinks) == len(depth):
            norms.plot(depth, sinks, color=line.get_color(), linestyle=":", linewidth=1)
        shares.plot(depth, [facts.strongest_share for facts in result.layers], label=result.encoder)
    norms.set(yscale="log", xlabel="depth of the block")
    shares.set(ylim=(0, 1), xlabel="depth of the block")
    set_title(norms, "Mean norm of caption tokens (dotted: first token)")
    set_title(shares, "Share of the squared norm in the strongest channel")
    label_lines(norms)
    label_lines(shares)
    save_figure(figure, path)
