"""Scores of a trained model on the scene benchmark: images sampled, judged by program, tracked."""

from __future__ import annotations

from pathlib import Path

from lidit.config import EvaluateSettings, TrackingSettings
from lidit.config.settings import flatten
from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.datasets.scenes.generator import GENERATOR_VERSION
from lidit.evals.scenes.evaluation import Evaluation, ScoredImage, evaluate_images, write_results
from lidit.evals.scenes.positional import plot_curves, positions_table, scene_curves
from lidit.evals.scenes.scorer import SCORER_VERSION
from lidit.grids import labelled_grid
from pipelines.evaluation.models import load_pipeline, model_identity
from pipelines.evaluation.scene_images import (
    images_folder,
    read_image,
    read_scenes,
    remove_others,
    sample_scenes,
    scene_targets,
)
from pipelines.evaluation.scorecard import Job, Scorecard, Scores
from pipelines.runtime.progress import ProgressBar

SCORES, TABLE, RESULTS, GRID = "scores.json", "scores.md", "results.jsonl", "grid.png"
POSITIONS = "positions.png"
GRID_PER_TAG = 6
# Scores depend on these besides model and settings: prompts or rules of another version are another
# benchmark.
RULES = {"generator": GENERATOR_VERSION, "scorer": SCORER_VERSION}
# of the settings; the sampler counts as part of the model
UNUSED = {"binding_scenes", "pictures", "sampler"}


def evaluate_scenes(
    model: Path, settings: EvaluateSettings, tracker: TrackingSettings, out: Path
) -> Scores:
    """Sample and score the benchmark's prompts; nothing is done again for the same weights, sampler
    and settings.

    Images that an interrupted call has sampled are kept. Once there are scores, `out` holds the
    images of this model and these settings only. The scores' table has lax and strict scores,
    intervals and the chance floor of each category.
    """
    # What the scores depend on, and whether an earlier call has them.
    used = settings.model_dump(mode="json", exclude=UNUSED) | RULES
    made_with = {"model": model_identity(model, settings.sampler), "settings": used}
    job = Job.of_model("evaluate", model, "evaluate", flatten(settings), "scenes", SCORES)
    card = Scorecard(out, job, made_with, tracker)
    if known := card.known("metrics", "table"):
        return Scores(known["metrics"], known["table"], out, computed=False)

    with card.evaluating():
        # Sample what an interrupted call has not sampled yet.
        pipe = load_pipeline(model, settings.sampler, drawing=True)
        items = benchmark_prompts(
            pipe.config.height, settings.layout, settings.seed, settings.per_tag, settings.tags
        )
        targets, images = scene_targets(items, settings), images_folder(card.identity)
        sample_scenes(pipe, items, targets, out / images, settings.batch_size)
        # Judge the images.
        with ProgressBar("score", len(targets), "images") as progress:
            sampled = read_scenes(out / images, targets, settings.images_per_prompt)
            evaluation = evaluate_images(items, sampled, progress=progress)
        # Write the results; images of earlier evaluations go when the new scores stand.
        card.begin()
        metrics, table, files = _write(out, evaluation, images)
        record = {
            "identity": card.identity,
            "made_with": made_with,
            "metrics": metrics,
            "table": table,
        }
        card.publish(metrics, files, record)
        remove_others(out / images)
        return Scores(metrics, table, out, computed=True)


def _write(
    out: Path, evaluation: Evaluation, images: str
) -> tuple[dict[str, float], str, list[str]]:
    """Write every file but the score file; returns metrics, table and the files that go to the
    tracker.
    """
    metrics, table = evaluation.metrics(), evaluation.table()
    files = [RESULTS, TABLE, GRID]
    curves = scene_curves(evaluation)
    if curves:
        plot_curves(out / POSITIONS, curves)
        files.append(POSITIONS)
        metrics |= {
            f"{tag}/{key}": value
            for tag, curve in curves.items()
            for key, value in curve.metrics().items()
        }
        table = f"{table}\n\n{positions_table(curves)}"
    write_results(out / RESULTS, evaluation, images)
    (out / TABLE).write_text(table + "\n")
    _write_grid(out / GRID, evaluation, out / images)
    return metrics, table, files


def _write_grid(path: Path, evaluation: Evaluation, images: Path) -> None:
    """The first images of each category, a row each, framed by the strict rule: chosen by position,
    not by result.
    """
    rows = {
        tag.tag: [image for image in evaluation.images if image.item["tag"] == tag.tag][
            :GRID_PER_TAG
        ]
        for tag in evaluation.tags
    }
    # As many columns as the shortest category fills: a category begins a row of its own.
    columns = min(map(len, rows.values()))
    shown: list[ScoredImage] = [image for row in rows.values() for image in row[:columns]]
    grid = labelled_grid(
        [read_image(images / image.filename) for image in shown],
        [str(image.item["prompt"]) for image in shown],
        columns=columns,
        right=[image.score.strict for image in shown],
        headings=[tag.replace("_", " ") for tag in rows],
    )
    grid.save(path)
