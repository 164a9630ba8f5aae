"""The official suites' images, sampled by a pool of workers; and what the official scorers say, in
the tracker.

An image whose file is whole is done, so a rerun samples only the missing images, on any number of
workers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lidit.config import EvaluateSettings, PoolSettings, SamplerChanges, TrackingSettings
from lidit.evals.scenes.positional import plot_curves
from lidit.evals.suites.registry import SuiteScores, parse_results, prepare_folder, suite_parts
from lidit.evals.suites.targets import (
    FIRST_SEED,
    IDENTITY_FILE,
    ImageTarget,
    check_drawn,
    missing,
    save_target,
)
from lidit.pipeline import LIDiTPipeline, image_bytes
from pipelines.evaluation.models import load_pipeline, weights_digest
from pipelines.evaluation.scorecard import Job, Scorecard
from pipelines.runtime import resources
from pipelines.runtime.progress import ProgressBar

ACTOR_RESTARTS = 3


@dataclass(frozen=True)
class SuiteImages:
    """`images` files are in `folder` now, `sampled` of them by this call."""

    folder: Path
    images: int
    sampled: int
    seconds: float


def sample_suite(
    model: Path,
    suite: str,
    prompts: Sequence[Path],
    settings: EvaluateSettings,
    pool: PoolSettings,
    out: Path,
) -> SuiteImages:
    """Sample what a suite's prompt files ask for and `out` lacks, in the layout the official scorer
    reads.

    settings: `batch_size`, images in one sampling batch, and `sampler`, changes to the model's own.
    Raises InputError for prompt files that are not the suite's, a folder with images of another
    model or prompt list, or a model that cannot be loaded; JobError where workers die too often.
    """
    started = time.monotonic()
    # A wrong file, model or sampler is noticed here, before any worker starts.
    parts = suite_parts(suite, prompts)
    pipe = LIDiTPipeline.from_pretrained(model)
    pipe.change_sampler(settings.sampler)
    pipe.objective.scheduler(pipe.sampler)
    # The folders are claimed for these images.
    identity = {
        "suite": suite,
        "model": weights_digest(model),
        "sampler": pipe.sampler.model_dump(mode="json"),
        "size": [pipe.config.height, pipe.config.width],
        "first_seed": FIRST_SEED,
    }
    for part in parts:
        prepare_folder(out, part, identity)
    # Workers sample the missing images.
    targets = [target for part in parts for target in part.targets]
    absent = missing(out, targets)
    with ProgressBar(
        f"draw {suite}", len(targets), "files", start=len(targets) - len(absent)
    ) as progress:
        for count in _sample(model.resolve(), settings, out.resolve(), absent, pool):
            progress.advance(count)
    return SuiteImages(out, len(targets), len(absent), time.monotonic() - started)


def _sample(
    model: Path,
    settings: EvaluateSettings,
    out: Path,
    targets: list[ImageTarget],
    pool: PoolSettings,
) -> Iterator[int]:
    """Numbers of files finished, as they are finished."""
    if not targets:
        return
    import ray
    from ray.util import ActorPool

    resources.connect(cpus=math.ceil(pool.actors * pool.cpus) + 1)
    resources.check_resources(pool)
    lives = {"max_restarts": ACTOR_RESTARTS, "max_task_retries": ACTOR_RESTARTS}
    kind = ray.remote(**resources.demands(pool), **lives)(ImageActor)
    batches = _batches(targets, settings.batch_size)
    threads = max(1, int(pool.cpus))
    actors = [
        kind.remote(model, settings.sampler, threads) for _ in range(min(pool.actors, len(batches)))
    ]
    try:
        with resources.plain_errors("a worker could not draw; finished images are kept"):
            yield from ActorPool(actors).map_unordered(
                lambda actor, batch: actor.sample.remote(out, batch), batches
            )
    finally:
        for actor in actors:
            ray.kill(actor)


def _batches(targets: list[ImageTarget], batch_size: int) -> list[list[ImageTarget]]:
    """Neighbours together, so that a prompt is encoded once for most of its images."""
    per_batch = max(1, batch_size // len(targets[0].seeds))
    return [targets[start : start + per_batch] for start in range(0, len(targets), per_batch)]


class ImageActor:
    """A worker that holds the model and its LLMs."""

    def __init__(self, model: Path, changes: SamplerChanges, threads: int) -> None:
        torch.set_num_threads(threads)
        self.pipe = load_pipeline(model, changes, drawing=True)

    def sample(self, out: Path, targets: list[ImageTarget]) -> int:
        """Sample and write the targets; returns how many."""
        prompts = [target.prompt for target in targets for _ in target.seeds]
        seeds = [seed for target in targets for seed in target.seeds]
        images = list(image_bytes(self.pipe(prompts, seed=seeds, output_type="pt").images))
        for target in targets:
            count = len(target.seeds)
            save_target(out, target, images[:count])
            images = images[count:]
        return len(targets)


def track_results(
    model: Path, suite: str, results: Path, graph: Path | None, tracker: TrackingSettings, out: Path
) -> SuiteScores:
    """The official aggregates of `results`, written to `out` and logged as a run of their own.

    Raises InputError where `model` is no model folder, the results are not what the suite's scorer
    writes, or the images they are of were sampled with other weights.
    """
    # The images' own record says which weights they are of.
    weights, images = weights_digest(model), out / suite
    categories = (
        [path.parent for path in sorted(results.glob(f"*/{IDENTITY_FILE}"))]
        if results.is_dir()
        else []
    )
    sampled_with = check_drawn(categories or [results.parent, images], suite, weights)
    scores = parse_results(suite, results, graph, drawn=images)
    if not sampled_with:
        unknown = f"NOT CHECKED: no {IDENTITY_FILE} in {images} says which weights drew the images"
        scores = replace(scores, notes=(*scores.notes, unknown))
    # Write the report, and track it; no score file: reading results is quick, so every call does it
    # anew.
    sampler = sampled_with.get("sampler")
    params = {"results": str(results), **({"sampler": json.dumps(sampler)} if sampler else {})}
    job = Job.of_model(suite, model, "evaluate", params, prefix=suite)
    job = replace(job, tags={**job.tags, "lidit.suite": suite, "lidit.weights": weights})
    made_with = {"model": weights, "suite": suite, "sampler": sampler, "metrics": scores.metrics}
    card = Scorecard(out, job, made_with, tracker)
    card.begin()
    report = f"{suite}.md"
    (out / report).write_text("\n\n".join([f"# {suite}", scores.table, *scores.notes]) + "\n")
    files = [report]
    if scores.curve is not None:
        files.append(f"{suite}.png")
        plot_curves(out / files[-1], {suite: scores.curve})
    card.publish({_metric_name(name): value for name, value in scores.metrics.items()}, files)
    return scores


def _metric_name(name: str) -> str:
    """MLflow refuses most punctuation in names."""
    return "".join(letter if letter.isalnum() or letter in "_-/. " else "_" for letter in name)
