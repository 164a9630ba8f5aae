"""Scores of a trained model on the scene benchmark: images drawn, judged by program, tracked; and binding accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lidit.config import EvaluateSettings, TrackingSettings
from lidit.evals.binding_table import measure_model, plot_binding
from lidit.evals.evaluate import Evaluation, evaluate_images, write_results
from lidit.evals.positional import plot_curves, scene_curves
from lidit.evals.scenes import benchmark_prompts
from lidit.pictures import labelled_grid
from lidit.pipeline import LIDiTPipeline
from lidit.settings import flatten
from lidit.store import digest_of
from pipelines import tracking
from pipelines.models import load_pipeline, weights_digest
from pipelines.progress import Progress

SCORES, TABLE, RESULTS, GRID = "scores.json", "scores.md", "results.jsonl", "grid.png"
POSITIONS = "positions.png"
BINDING_SCORES, BINDING_TABLE, BINDING_POSITIONS = "binding.json", "binding.md", "binding-positions.png"
GRID_PER_TAG = 6


@dataclass(frozen=True)
class SceneScores:
    """`table`: Markdown with lax and strict scores, intervals and the chance floor of each category."""

    metrics: dict[str, float]
    table: str
    folder: Path
    computed: bool


def evaluate_scenes(model: Path, settings: EvaluateSettings, tracker: TrackingSettings, out: Path) -> SceneScores:
    """Draw and score the benchmark's prompts; nothing is done again for the same weights and settings."""
    identity = digest_of({"model": weights_digest(model), "settings": settings.model_dump(mode="json")})
    known = _known_scores(out, SCORES, identity)
    if known:
        return known
    pipe = load_pipeline(model)
    size = pipe.config.height
    items = benchmark_prompts(size, settings.layout, settings.seed, settings.per_tag, settings.tags)
    prompts = [item["prompt"] for item in items for _ in range(settings.images_per_prompt)]
    seeds = [settings.seed * 1_000_003 + number for number in range(len(prompts))]
    with Progress("draw", len(prompts), "images") as progress:
        images = _draw(pipe, prompts, seeds, settings.batch_size, progress.update)
    groups = [images[i : i + settings.images_per_prompt] for i in range(0, len(images), settings.images_per_prompt)]
    with Progress("score", len(prompts), "images") as progress:
        evaluation = evaluate_images(items, groups, progress=lambda done: progress.update(done))
    return _publish(model, settings, tracker, out, identity, evaluation, images)


def _draw(
    pipe: LIDiTPipeline, prompts: list[str], seeds: list[int], batch_size: int, done: Callable[[int], None]
) -> list[NDArray[np.uint8]]:
    images: list[NDArray[np.uint8]] = []
    for start in range(0, len(prompts), batch_size):
        stop = start + batch_size
        images.extend(pipe(prompts[start:stop], seed=seeds[start:stop], output_type="np"))
        done(len(images))
    return images


def _publish(
    model: Path,
    settings: EvaluateSettings,
    tracker: TrackingSettings,
    out: Path,
    identity: str,
    evaluation: Evaluation,
    images: list[NDArray[np.uint8]],
) -> SceneScores:
    out.mkdir(parents=True, exist_ok=True)
    metrics, table = evaluation.metrics(), evaluation.table()
    write_results(out / RESULTS, evaluation)
    (out / TABLE).write_text(table + "\n")
    _draw_grid(out / GRID, evaluation, images)
    files = [RESULTS, TABLE, GRID]
    curves = scene_curves(evaluation)
    if curves:
        plot_curves(out / POSITIONS, curves)
        files.append(POSITIONS)
        metrics |= {f"{tag}/{key}": value for tag, curve in curves.items() for key, value in curve.metrics().items()}
    return _track("evaluate", model, settings, tracker, out, identity, (metrics, table), "scenes", SCORES, files)


def _track(
    job: str,
    model: Path,
    settings: EvaluateSettings,
    tracker: TrackingSettings,
    out: Path,
    identity: str,
    found: tuple[dict[str, float], str],
    prefix: str,
    scores: str,
    files: list[str],
) -> SceneScores:
    """Metrics and files in a run of their own; the `scores` file, written last, says that all is there."""
    metrics, table = found
    uri = tracking.store_uri(tracker.uri, model.resolve().parent.parent)
    tags = {"lidit.job": job, "lidit.model": str(model), "lidit.identity": identity}
    name = f"{job} {model.resolve().parent.name}"
    with tracking.tracked_run(uri, tracker.experiment, name, identity[:32], flatten(settings), tags, out) as run:
        run.metrics({f"{prefix}/{key}": value for key, value in metrics.items()}, 0)
        for file in files:
            run.artifact(out / file)
    (out / scores).write_text(json.dumps({"identity": identity, "metrics": metrics, "table": table}, indent=1))
    return SceneScores(metrics, table, out, computed=True)


def evaluate_binding(model: Path, settings: EvaluateSettings, tracker: TrackingSettings, out: Path) -> SceneScores:
    """Binding, attribute and relation accuracy without sampling; nothing is done again for the same weights."""
    used = settings.model_dump(mode="json", include={"binding_scenes", "layout", "seed"})
    identity = digest_of({"model": weights_digest(model), "binding": used})
    known = _known_scores(out, BINDING_SCORES, identity)
    if known:
        return known
    pipe = load_pipeline(model)
    scores = measure_model(pipe, settings.layout, settings.binding_scenes, settings.batch_size, settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / BINDING_TABLE).write_text(scores.table + "\n")
    files = [BINDING_TABLE]
    if scores.by_position:
        plot_binding(out / BINDING_POSITIONS, scores.by_position)
        files.append(BINDING_POSITIONS)
    found = (scores.metrics, scores.table)
    return _track("binding", model, settings, tracker, out, identity, found, "binding", BINDING_SCORES, files)


def _draw_grid(path: Path, evaluation: Evaluation, images: list[NDArray[np.uint8]]) -> None:
    """The first images of each category, a row each, framed by the strict rule: chosen by position, not by result."""
    numbers: list[int] = []
    for tag in evaluation.tags:
        numbers += [i for i, one in enumerate(evaluation.images) if one.item["tag"] == tag.tag][:GRID_PER_TAG]
    shown = [evaluation.images[i] for i in numbers]
    grid = labelled_grid(
        [images[i] for i in numbers],
        [str(one.item["prompt"]) for one in shown],
        columns=GRID_PER_TAG,
        right=[one.score.strict for one in shown],
    )
    grid.save(path)


def _known_scores(out: Path, file: str, identity: str) -> SceneScores | None:
    try:
        known = json.loads((out / file).read_text())
    except (OSError, ValueError):
        return None
    if known.get("identity") != identity:
        return None
    return SceneScores(known["metrics"], known["table"], out, computed=False)
