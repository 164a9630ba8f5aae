"""Scores of a trained model on the scene benchmark: images drawn, judged by program, tracked; and binding accuracy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lidit.config import EvaluateSettings, TrackingSettings
from lidit.config.settings import flatten
from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.datasets.scenes.generator import GENERATOR_VERSION
from lidit.evals.classifier.binding_table import measure_model, plot_binding
from lidit.evals.scenes.evaluation import Evaluation, ScoredImage, evaluate_images, write_results
from lidit.evals.scenes.positional import plot_curves, positions_table, scene_curves
from lidit.evals.scenes.scorer import SCORER_VERSION
from lidit.plots import labelled_grid
from lidit.store import digest_of
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from pipelines import tracking
from pipelines.evaluation.models import load_pipeline, model_identity
from pipelines.evaluation.scene_images import (
    draw_scenes,
    images_folder,
    read_image,
    read_scenes,
    remove_others,
    scene_targets,
)
from pipelines.runtime.progress import Progress

SCORES, TABLE, RESULTS, GRID = "scores.json", "scores.md", "results.jsonl", "grid.png"
POSITIONS = "positions.png"
BINDING_SCORES, BINDING_TABLE, BINDING_POSITIONS = "binding.json", "binding.md", "binding-positions.png"
GRID_PER_TAG = 6
# what scores depend on besides model and settings: prompts and rules of another version are another benchmark
RULES = {"generator": GENERATOR_VERSION, "scorer": SCORER_VERSION}


@dataclass(frozen=True)
class SceneScores:
    """`table`: Markdown with lax and strict scores, intervals and the chance floor of each category."""

    metrics: dict[str, float]
    table: str
    folder: Path
    computed: bool


def evaluate_scenes(model: Path, settings: EvaluateSettings, tracker: TrackingSettings, out: Path) -> SceneScores:
    """Draw and score the benchmark's prompts; nothing is done again for the same weights, sampler and settings.

    Images that an interrupted call has drawn are kept. Once there are scores, `out` holds the images of this model and
    these settings only.
    """
    used = settings.model_dump(mode="json", exclude={"binding_scenes", "pictures", "sampler"})
    made_with = {"model": model_identity(model, settings.sampler), "settings": used | RULES}
    known = _known_scores(out, SCORES, made_with)
    if known:
        return known
    pipe = load_pipeline(model)
    pipe.sampler = settings.sampler.applied(pipe.sampler)
    items = benchmark_prompts(pipe.config.height, settings.layout, settings.seed, settings.per_tag, settings.tags)
    targets, images = scene_targets(items, settings), images_folder(digest_of(made_with))
    draw_scenes(pipe, items, targets, out / images, settings.batch_size)
    with Progress("score", len(targets), "images") as progress:
        drawn = read_scenes(out / images, targets, settings.images_per_prompt)
        evaluation = evaluate_images(items, drawn, progress=lambda done: progress.update(done))
    files, found = _write(out, evaluation, images)
    scores = _track("evaluate", model, settings, tracker, out, made_with, found, "scenes", SCORES, files)
    remove_others(out / images)
    return scores


def _write(out: Path, evaluation: Evaluation, images: str) -> tuple[list[str], tuple[dict[str, float], str]]:
    """The files that go to the tracker; metrics and table."""
    _begin(out, SCORES)
    metrics, table = evaluation.metrics(), evaluation.table()
    files = [RESULTS, TABLE, GRID]
    curves = scene_curves(evaluation)
    if curves:
        plot_curves(out / POSITIONS, curves)
        files.append(POSITIONS)
        metrics |= {f"{tag}/{key}": value for tag, curve in curves.items() for key, value in curve.metrics().items()}
        table = f"{table}\n\n{positions_table(curves)}"
    write_results(out / RESULTS, evaluation, images)
    (out / TABLE).write_text(table + "\n")
    _draw_grid(out / GRID, evaluation, out / images)
    return files, (metrics, table)


def _begin(out: Path, scores: str) -> None:
    """Scores that are there say that the files beside them are theirs: from here on they are not."""
    out.mkdir(parents=True, exist_ok=True)
    (out / scores).unlink(missing_ok=True)


def _track(
    job: str,
    model: Path,
    settings: EvaluateSettings,
    tracker: TrackingSettings,
    out: Path,
    made_with: Mapping[str, Any],
    found: tuple[dict[str, float], str],
    prefix: str,
    scores: str,
    files: list[str],
) -> SceneScores:
    """Metrics and files in a run of their own; the `scores` file, written last, says that all is there."""
    metrics, table = found
    identity = digest_of(made_with)
    uri = tracking.store_uri(tracker.uri, model.resolve().parent.parent)
    tags = {"lidit.job": job, "lidit.model": str(model), "lidit.identity": identity}
    name = f"{job} {model.resolve().parent.name}"
    with tracking.tracked_run(uri, tracker.experiment, name, identity[:32], flatten(settings), tags, out) as run:
        run.metrics({f"{prefix}/{key}": value for key, value in metrics.items()}, 0)
        for file in files:
            run.artifact(out / file)
    record = {"identity": identity, "made_with": made_with, "metrics": metrics, "table": table}
    publish_bytes(Folder.at(out), scores, json.dumps(record, indent=1).encode())
    return SceneScores(metrics, table, out, computed=True)


def evaluate_binding(model: Path, settings: EvaluateSettings, tracker: TrackingSettings, out: Path) -> SceneScores:
    """Binding, attribute and relation accuracy without sampling; nothing is done again for the same weights."""
    used = settings.model_dump(mode="json", include={"binding_scenes", "layout", "seed"}) | RULES
    losses_of = {name: value for name, value in model_identity(model).items() if name != "sampler"}
    made_with = {"model": losses_of, "settings": used}
    known = _known_scores(out, BINDING_SCORES, made_with)
    if known:
        return known
    pipe = load_pipeline(model)
    scores = measure_model(pipe, settings.layout, settings.binding_scenes, settings.batch_size, settings.seed)
    _begin(out, BINDING_SCORES)
    (out / BINDING_TABLE).write_text(scores.table + "\n")
    files = [BINDING_TABLE]
    if scores.by_position:
        plot_binding(out / BINDING_POSITIONS, scores.by_position)
        files.append(BINDING_POSITIONS)
    found = (scores.metrics, scores.table)
    return _track("binding", model, settings, tracker, out, made_with, found, "binding", BINDING_SCORES, files)


def _draw_grid(path: Path, evaluation: Evaluation, images: Path) -> None:
    """The first images of each category, a row each, framed by the strict rule: chosen by position, not by result."""
    shown: list[ScoredImage] = []
    for tag in evaluation.tags:
        shown += [one for one in evaluation.images if one.item["tag"] == tag.tag][:GRID_PER_TAG]
    grid = labelled_grid(
        [read_image(images / one.filename) for one in shown],
        [str(one.item["prompt"]) for one in shown],
        columns=GRID_PER_TAG,
        right=[one.score.strict for one in shown],
    )
    grid.save(path)


def _known_scores(out: Path, file: str, made_with: Mapping[str, Any]) -> SceneScores | None:
    try:
        known = json.loads((out / file).read_text())
        if known["identity"] == digest_of(made_with):
            return SceneScores(known["metrics"], known["table"], out, computed=False)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there or not whole: it is made again
    return None
