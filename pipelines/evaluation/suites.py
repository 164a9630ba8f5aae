"""The official suites' images, drawn by a pool of workers; and what the official scorers say, in the tracker.

An image that is there whole is done, so a rerun draws only what is missing, on any number of workers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lidit.config import PoolSettings, SamplerChanges, SamplerSettings, TrackingSettings
from lidit.evals.scenes.positional import plot_curves
from lidit.evals.suites.registry import SuiteScores, parse_results, prepare_folder, suite_parts
from lidit.evals.suites.targets import FIRST_SEED, IDENTITY_FILE, ImageTarget, check_drawn, missing, save_target
from lidit.pipeline import LIDiTPipeline
from lidit.store import digest_of
from pipelines import tracking
from pipelines.evaluation.models import load_pipeline, weights_digest
from pipelines.runtime import resources
from pipelines.runtime.progress import Progress

ACTOR_RESTARTS = 3


@dataclass(frozen=True)
class SuiteImages:
    """`images` files are in `folder` now, `drawn` of them by this call."""

    folder: Path
    images: int
    drawn: int
    seconds: float


def draw_suite(
    model: Path,
    suite: str,
    prompts: Sequence[Path],
    out: Path,
    pool: PoolSettings,
    batch_size: int,
    changes: SamplerChanges | None = None,
) -> SuiteImages:
    """Draw what a suite's prompt files ask for and `out` does not have yet, in the layout the official scorer reads.

    batch_size: images in one sampling batch. changes: to the model's own sampler. Raises InputError for prompt files
    that are not the suite's, a folder with images of another model or prompt list, or a model that cannot be loaded;
    JobError where workers die too often.
    """
    started = time.monotonic()
    parts = suite_parts(suite, prompts)
    pipe = LIDiTPipeline.from_pretrained(model)  # a wrong folder is noticed here, before any worker starts
    sampler = (changes or SamplerChanges()).applied(pipe.sampler)
    pipe.objective.scheduler(sampler)
    identity = {
        "suite": suite,
        "model": weights_digest(model),
        "sampler": sampler.model_dump(mode="json"),
        "size": [pipe.config.height, pipe.config.width],
        "first_seed": FIRST_SEED,
    }
    for part in parts:
        prepare_folder(out, part, identity)
    targets = [target for part in parts for target in part.targets]
    absent = missing(out, targets)
    with Progress(f"draw {suite}", len(targets), "files", start=len(targets) - len(absent)) as progress:
        for drawn in _draw(model.resolve(), sampler, out.resolve(), absent, pool, batch_size):
            progress.advance(drawn)
    return SuiteImages(out, len(targets), len(absent), time.monotonic() - started)


def _draw(
    model: Path, sampler: SamplerSettings, out: Path, targets: list[ImageTarget], pool: PoolSettings, batch_size: int
) -> Iterator[int]:
    """Numbers of files finished, as they are finished."""
    if not targets:
        return
    import ray
    from ray.util import ActorPool

    resources.connect(cpus=math.ceil(pool.actors * pool.cpus) + 1)
    resources.check_resources(pool)
    lives = {"max_restarts": ACTOR_RESTARTS, "max_task_retries": ACTOR_RESTARTS}
    kind = ray.remote(**resources.demands(pool), **lives)(Painter)
    batches = _batches(targets, batch_size)
    actors = [kind.remote(model, sampler, max(1, int(pool.cpus))) for _ in range(min(pool.actors, len(batches)))]
    try:
        with resources.plain_errors("a worker could not draw; finished images are kept"):
            yield from ActorPool(actors).map_unordered(lambda actor, batch: actor.draw.remote(out, batch), batches)
    finally:
        for actor in actors:
            ray.kill(actor)


def _batches(targets: list[ImageTarget], batch_size: int) -> list[list[ImageTarget]]:
    """Neighbours together, so that a prompt is encoded once for most of its images."""
    per_batch = max(1, batch_size // len(targets[0].seeds))
    return [targets[start : start + per_batch] for start in range(0, len(targets), per_batch)]


class Painter:
    """A worker that holds the model and its LLMs."""

    def __init__(self, model: Path, sampler: SamplerSettings, threads: int) -> None:
        torch.set_num_threads(threads)
        self.pipe = load_pipeline(model)
        self.pipe.sampler = sampler

    def draw(self, out: Path, targets: list[ImageTarget]) -> int:
        """Draw and write the targets; returns how many."""
        prompts = [target.prompt for target in targets for _ in target.seeds]
        seeds = [seed for target in targets for seed in target.seeds]
        images = list(self.pipe(prompts, seed=seeds, output_type="np"))
        for target in targets:
            count = len(target.seeds)
            save_target(out, target, images[:count])
            images = images[count:]
        return len(targets)


def track_results(
    model: Path, suite: str, results: Path, graph: Path | None, tracker: TrackingSettings, out: Path
) -> SuiteScores:
    """The official aggregates of `results`, written to `out` and logged as a run of their own.

    Raises InputError where `model` is no model folder, the results are not what the suite's scorer writes, or the
    images they are of were drawn by other weights.
    """
    weights = weights_digest(model)
    drawn = out / suite
    categories = [folder.parent for folder in sorted(results.glob(f"*/{IDENTITY_FILE}"))] if results.is_dir() else []
    made_with = check_drawn(categories or [results.parent, drawn], suite, weights)
    scores = parse_results(suite, results, graph, drawn=drawn)
    if not made_with:
        unknown = f"NOT CHECKED: no {IDENTITY_FILE} in {drawn} says which weights drew the images"
        scores = replace(scores, notes=(*scores.notes, unknown))
    out.mkdir(parents=True, exist_ok=True)
    report = out / f"{suite}.md"
    report.write_text("\n\n".join([f"# {suite}", scores.table, *scores.notes]) + "\n")
    artifacts = [report]
    if scores.curve is not None:
        artifacts.append(out / f"{suite}.png")
        plot_curves(artifacts[-1], {suite: scores.curve})
    sampler = made_with.get("sampler")
    key = digest_of({"model": weights, "suite": suite, "sampler": sampler, "metrics": scores.metrics})[:32]
    params = {"results": str(results), **({"sampler": json.dumps(sampler)} if sampler else {})}
    uri = tracking.store_uri(tracker.uri, model.resolve().parent.parent)
    tags = {"lidit.job": "evaluate", "lidit.suite": suite, "lidit.model": str(model), "lidit.weights": weights}
    name = f"{suite} {model.resolve().parent.name}"
    with tracking.tracked_run(uri, tracker.experiment, name, key, params, tags, out) as run:
        run.metrics({f"{suite}/{_metric_name(name)}": value for name, value in scores.metrics.items()}, 0)
        for path in artifacts:
            run.artifact(path)
    return scores


def _metric_name(name: str) -> str:
    """MLflow refuses most punctuation in names."""
    return "".join(letter if letter.isalnum() or letter in "_-/. " else "_" for letter in name)
