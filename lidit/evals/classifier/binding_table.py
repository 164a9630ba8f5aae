"""The binding and relation measures of a trained model: which cases, the table, and the curve over
positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lidit.evals.classifier.binding import Case, Measure, generate_cases, measure_binding, pixels
from lidit.evals.classifier.caption_loss import pipeline_latents, pipeline_loss
from lidit.evals.statistics import Interval
from lidit.pipeline import LIDiTPipeline
from lidit.plots import plot_intervals

SIMPLE = (
    Measure("attribute", "colors"),
    Measure("relation", "position"),
    Measure("binding", "color_attr"),
    Measure("binding", "color_attr", split="unseen"),
)
FREE = (
    *SIMPLE,
    Measure("binding", "size_attr"),
    Measure("binding", "list4"),
    Measure("binding", "list8"),
)


@dataclass(frozen=True)
class BindingScores:
    """`metrics`: flat numbers for a tracker; `table`: Markdown; `by_position`: measure -> accuracy
    per segment.
    """

    metrics: dict[str, float]
    table: str
    by_position: dict[str, tuple[Interval, ...]]


def measure_model(
    pipe: LIDiTPipeline, layout: str, count: int, batch_size: int = 64, seed: int = 0
) -> BindingScores:
    """Binding, attribute and relation accuracy of a loaded model on `count` fresh scenes per
    measure, no sampling.

    Scenes are generated at the model's training size, with seeds no training set uses. Raises
    InputError where the layout does not exist or the size is too small for it.
    """
    measures = SIMPLE if layout == "simple" else FREE
    size = int(pipe.config.height)
    generated: dict[Measure, list[Case]] = {
        m: generate_cases(m, count, size, layout, seed) for m in measures
    }
    captions = [
        text
        for cases in generated.values()
        for case in cases
        for text in (case.caption, case.wrong)
    ]
    loss = pipeline_loss(pipe, captions)
    metrics: dict[str, float] = {}
    by_position: dict[str, tuple[Interval, ...]] = {}
    lines = [
        "| error | captions | accuracy (chance .5) | loss gap | scenes |",
        "|---|---|---|---|---|",
    ]
    for measure, cases in generated.items():
        latents = pipeline_latents(pipe, pixels(cases))
        result = measure_binding(loss, cases, latents, batch_size=batch_size, seed=seed)
        metrics |= {f"{measure.name}/{key}": value for key, value in result.metrics().items()}
        if len(result.by_position) > 2:
            by_position[measure.name] = tuple(result.by_position.values())
        held_out = ", held-out pairs" if measure.split == "unseen" else ""
        lines.append(
            f"| {measure.kind} | {measure.tag}, {measure.style}{held_out} | {result.accuracy} | "
            f"{result.gap} "
            f"| {len(cases)} |"
        )
    return BindingScores(metrics, "\n".join(lines), by_position)


def plot_binding(path: Path, by_position: Mapping[str, tuple[Interval, ...]]) -> None:
    """Accuracy by the segment the error is in, as a PNG."""
    plot_intervals(
        path, by_position, "binding accuracy", "Binding accuracy by position in the prompt"
    )
