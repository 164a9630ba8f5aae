"""Scores of a trained model on the scene benchmark: images drawn, judged by program, tracked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lidit.config import EvaluateSettings, TrackingSettings
from lidit.evals.evaluate import Evaluation, evaluate_images, write_results
from lidit.evals.scenes import benchmark_prompts
from lidit.pictures import labelled_grid
from lidit.pipeline import LIDiTPipeline
from lidit.settings import flatten
from lidit.store import digest_of
from pipelines import tracking
from pipelines.progress import Progress

SCORES, TABLE, RESULTS, GRID = "scores.json", "scores.md", "results.jsonl", "grid.png"
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
    identity = digest_of({"model": _weights_digest(model), "settings": settings.model_dump(mode="json")})
    known = _known_scores(out, identity)
    if known:
        return known
    pipe = LIDiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)  # ours counts images, not steps of one batch
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
    labelled_grid(*_chosen(evaluation, images), columns=GRID_PER_TAG).save(out / GRID)
    uri = tracker.uri or tracking.local_store(model.resolve().parent.parent)
    tags = {"lidit.job": "evaluate", "lidit.model": str(model), "lidit.identity": identity}
    name = f"evaluate {model.resolve().parent.name}"
    with tracking.tracked_run(uri, tracker.experiment, name, identity[:32], flatten(settings), tags, out) as run:
        run.metrics({f"scenes/{key}": value for key, value in metrics.items()}, 0)
        for file in (RESULTS, TABLE, GRID):
            run.artifact(out / file)
    (out / SCORES).write_text(json.dumps({"identity": identity, "metrics": metrics, "table": table}, indent=1))
    return SceneScores(metrics, table, out, computed=True)


def _chosen(evaluation: Evaluation, images: list[NDArray[np.uint8]]) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """The first images of each category, a row each, marked right or wrong: chosen by position, not by result."""
    chosen, labels = [], []
    for tag in evaluation.tags:
        numbers = [i for i, one in enumerate(evaluation.images) if one.item["tag"] == tag.tag][:GRID_PER_TAG]
        for number in numbers:
            one = evaluation.images[number]
            chosen.append(images[number])
            labels.append(f"{'✓' if one.score.strict else '×'} {one.item['prompt']}")
    return chosen, labels


def _weights_digest(model: Path) -> str:
    """sha256 over the model folder's weight files."""
    total = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _known_scores(out: Path, identity: str) -> SceneScores | None:
    try:
        known = json.loads((out / SCORES).read_text())
    except (OSError, ValueError):
        return None
    if known.get("identity") != identity:
        return None
    return SceneScores(known["metrics"], known["table"], out, computed=False)
