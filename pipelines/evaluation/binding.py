"""Binding, attribute and relation accuracy of a trained model: measured on losses, without
sampling.
"""

from __future__ import annotations

from pathlib import Path

from lidit.config import EvaluateSettings, TrackingSettings
from lidit.config.settings import flatten
from lidit.evals.classifier.binding_table import measure_model, plot_binding
from pipelines.evaluation.models import load_pipeline, model_identity
from pipelines.evaluation.scenes import RULES
from pipelines.evaluation.scorecard import Job, Scorecard, Scores

SCORES, TABLE, POSITIONS = "binding.json", "binding.md", "binding-positions.png"
USED = {"binding_scenes", "layout", "seed"}  # of the settings


def evaluate_binding(
    model: Path, settings: EvaluateSettings, tracker: TrackingSettings, out: Path
) -> Scores:
    """Binding, attribute and relation accuracy; nothing is done again for the same weights."""
    # Losses do not depend on the sampler.
    losses_of = {name: value for name, value in model_identity(model).items() if name != "sampler"}
    made_with = {
        "model": losses_of,
        "settings": settings.model_dump(mode="json", include=USED) | RULES,
    }
    job = Job.of_model("binding", model, "binding", flatten(settings), "binding", SCORES)
    card = Scorecard(out, job, made_with, tracker)
    if known := card.known("metrics", "table"):
        return Scores(known["metrics"], known["table"], out, computed=False)

    with card.evaluating():
        # Measure.
        pipe = load_pipeline(model)
        measured = measure_model(
            pipe, settings.layout, settings.binding_scenes, settings.batch_size, settings.seed
        )
        # Write the results.
        card.begin()
        (out / TABLE).write_text(measured.table + "\n")
        files = [TABLE]
        if measured.by_position:
            plot_binding(out / POSITIONS, measured.by_position)
            files.append(POSITIONS)
        record = {
            "identity": card.identity,
            "made_with": made_with,
            "metrics": measured.metrics,
            "table": measured.table,
        }
        card.publish(measured.metrics, files, record)
        return Scores(measured.metrics, measured.table, out, computed=True)
