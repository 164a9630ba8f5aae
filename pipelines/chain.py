"""A recipe from its sources to its scores, stage by stage.

The chain keeps no state of its own: every stage finds out by its manifests what is finished, so the
same call after any interruption goes on where it stopped, and a finished chain starts neither Ray
nor a model.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from lidit.codecs import codec_spec
from lidit.config import (
    EncoderSettings,
    EvaluateSettings,
    PoolSettings,
    Recipe,
    SamplerChanges,
    Stage,
)
from lidit.data.credit import credit_of, forget_credit
from lidit.store import Corpus, FamilyWriter
from lidit.text import resolve_encoder
from pipelines.corpus.distinct import embed_corpus
from pipelines.corpus.embed import EmbedSummary
from pipelines.corpus.encode_units import EncodeJob
from pipelines.corpus.ingest import run_ingest
from pipelines.corpus.latents import run_latents
from pipelines.corpus.rolling import RollingRun, announce, most_actors, producing
from pipelines.corpus.tracked import track_embed, track_ingest, track_latents
from pipelines.evaluation.scenes import evaluate_scenes
from pipelines.runtime import resources
from pipelines.runtime.progress import Display, ProgressBar
from pipelines.training.driver import TrainResult, finished_step
from pipelines.training.train import train

log = logging.getLogger(__name__)
STAGES: tuple[Stage, ...] = get_args(Stage)
READERS = 1  # logical CPUs of one embedding besides its actors
SPARE_CPUS = 2  # workers of the stage before may still be on their way out
Made = dict[Stage, Any]
ShowSummary = Callable[[Stage, Any], None]
Resources = Mapping[str, float]


@dataclass(frozen=True)
class RollingStage:
    """Families that are produced beside training, and for which run."""

    jobs: Sequence[EncodeJob]
    run: RollingRun


def run_chain(
    recipe: Recipe, show: ShowSummary, until: Stage = "evaluate", allow_drift: bool = False
) -> Made:
    """Do what is missing of the recipe's stages up to `until`; the summary of each, of embed the
    last encoder's.

    show: called after each stage (embed: after each encoder) with its summary, also when nothing
    was left to do. Without `sources` the corpus must exist. Raises InputError, before anything is
    started, for encoders or a codec that cannot be used; otherwise what the stages raise. What is
    finished is kept.
    """
    stages = STAGES[: STAGES.index(until) + 1]
    made: Made = {}

    def keep(stage: Stage, summary: Any) -> None:
        made[stage] = summary
        show(stage, summary)

    _check(recipe, stages)
    # An embedded Ray cannot grow between stages: whichever stage starts it asks for what any of
    # them needs.
    cpus = _logical_cpus(recipe)
    if recipe.sources:
        with ProgressBar("ingest", None, "files") as progress:
            made_corpus = run_ingest(recipe.sources, recipe.corpus, recipe.ingest, progress, cpus)
        track_ingest(
            recipe.corpus, recipe.ingest, made_corpus, recipe.tracking, Path(recipe.output)
        )
        keep("ingest", made_corpus)
    corpus = Corpus.open(recipe.corpus)
    rolling: RollingStage | None = None
    if "embed" in stages and recipe.online:
        rolling = _announce(recipe, corpus, cpus)
    elif "embed" in stages:
        _embed(recipe, corpus, cpus, keep)
    if "latents" in stages:
        with ProgressBar(f"latents {recipe.codec.name}", None, "units") as progress:
            latents = run_latents(recipe.corpus, recipe.codec, recipe.pool, progress, cpus)
        track_latents(recipe.corpus, recipe.codec, latents, recipe.tracking, Path(recipe.output))
        keep("latents", latents)
    if "train" not in stages:
        return made
    trained = _train(recipe, rolling, allow_drift, keep)
    if "evaluate" in stages:
        out = recipe.run_folder / "evaluation"
        keep("evaluate", evaluate_scenes(trained.model, _evaluation(recipe), recipe.tracking, out))
    return made


def _announce(recipe: Recipe, corpus: Corpus, cpus: int) -> RollingStage | None:
    """Make the families of all encoders ready for training; None where nothing is left to be
    produced beside it.
    """
    assert recipe.online
    # Whatever a run says of itself, it may go back to a checkpoint until it has published its
    # model.
    run = RollingRun(recipe.online, credit_of(recipe, corpus), ends=False)
    made = [
        announce(recipe.corpus, encoder, recipe.pool_of(encoder.name), run, cpus)
        for encoder in recipe.encoders
    ]
    jobs = [job for job in made if job is not None]
    if not recipe.run_folder.exists():
        for job in jobs:
            forget_credit(job.writer().folder, run.expected)
    if not jobs or (finished_step(recipe.run_folder) or 0) >= recipe.train.steps:
        return None
    resources.connect(cpus)
    pools = [most_actors(job.pool, recipe.online) for job in jobs]
    resources.check_together(
        [*pools, resources.worker_pool(recipe.engine)], "encoders and training"
    )
    return RollingStage(jobs, run)


def _train(
    recipe: Recipe, rolling: RollingStage | None, allow_drift: bool, keep: ShowSummary
) -> TrainResult:
    """Train; beside it, produce rolling families, each encoder on its own pool."""
    if rolling is None:
        trained = train(recipe, allow_drift)
    else:
        with producing(rolling.jobs, rolling.run) as produced:
            trained = train(recipe, allow_drift)
        for summary in produced:
            keep("embed", summary)
    keep("train", trained)
    return trained


def _check(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Everything a later stage would refuse hours from now."""
    if "embed" in stages:
        for encoder in recipe.encoders:
            resolve_encoder(encoder, _device(recipe.pool_of(encoder.name)))
    if "latents" in stages:
        codec_spec(recipe.codec, _device(recipe.pool))


def _evaluation(recipe: Recipe) -> EvaluateSettings:
    """The recipe's own sampler, also where it was changed after the model folder was written."""
    own, changes = (
        recipe.sampler.model_dump(),
        recipe.evaluate.sampler.model_dump(exclude_none=True),
    )
    return recipe.evaluate.model_copy(update={"sampler": SamplerChanges(**{**own, **changes})})


def _device(pool: PoolSettings) -> str:
    return "cuda" if pool.gpus else "cpu"


def _logical_cpus(recipe: Recipe) -> int:
    """What an embedded Ray needs so that no stage waits for itself."""
    pools = [recipe.pool_of(encoder.name) for encoder in recipe.encoders]
    training = recipe.engine.workers * recipe.engine.cpus_per_worker + 2
    if recipe.online:  # both sides at once
        pools = [most_actors(pool, recipe.online) for pool in pools]
        training += sum(_demand(pool)["CPU"] for pool in pools)
    embedding = sum(_demand(pool)["CPU"] for pool in pools)
    return math.ceil(max(embedding, _demand(recipe.pool)["CPU"], training)) + SPARE_CPUS


# -- several encoders ------------------------------------------------------------------------------


def _embed(recipe: Recipe, corpus: Corpus, cpus: int, show: ShowSummary) -> None:
    """Embed with every encoder: finished families first, for they need no Ray, the others side by
    side.
    """
    with Display() as display:

        def embed(encoder: EncoderSettings) -> EmbedSummary:
            with ProgressBar(
                f"embed {encoder.name}", None, "captions", display=display
            ) as progress:
                summary = embed_corpus(
                    recipe.corpus, encoder, recipe.pool_of(encoder.name), progress, cpus
                )
            track_embed(recipe.corpus, encoder, summary, recipe.tracking, Path(recipe.output))
            return summary

        pending = []
        for encoder in recipe.encoders:
            spec = resolve_encoder(encoder, _device(recipe.pool_of(encoder.name)))
            if FamilyWriter(corpus.folder.location, "text", spec.name, spec.to_dict()).complete():
                show("embed", embed(encoder))
            else:
                pending.append(encoder)
        if len(pending) == 1:
            show("embed", embed(pending[0]))
        elif pending:
            resources.connect(cpus)
            demands = {encoder.name: _demand(recipe.pool_of(encoder.name)) for encoder in pending}
            calls = {encoder.name: partial(embed, encoder) for encoder in pending}
            side_by_side(
                calls, demands, _capacity(len(pending)), lambda summary: show("embed", summary)
            )


def _demand(pool: PoolSettings) -> dict[str, float]:
    """What the actors and readers of one embedding take."""
    named = {"CPU": pool.cpus, "GPU": pool.gpus, **pool.resources}
    demand = {name: pool.actors * amount for name, amount in named.items() if amount}
    return {**demand, "CPU": demand.get("CPU", 0) + READERS}


def _capacity(encoders: int) -> dict[str, float]:
    """What may be in use at once. An embedded Ray counts logical CPUs; encoders need real ones,
    readers hardly any.
    """
    offered = resources.cluster_resources()
    if os.environ.get(resources.CLUSTER_ADDRESS):
        return offered
    return {
        **offered,
        "CPU": min(offered.get("CPU", 0), (os.cpu_count() or 1) + READERS * encoders),
    }


def side_by_side(
    calls: Mapping[str, Callable[[], Any]],
    demands: Mapping[str, Resources],
    capacity: Resources,
    done: Callable[[Any], None],
) -> None:
    """Make the calls in threads, as many at once as fit into `capacity`, in order; at least one at
    a time.

    done: called here with each result. When a call fails the others go on, for what they finish is
    kept; then the first error is raised.
    """
    free, waiting = dict(capacity), list(calls)
    running: set[str] = set()
    ended: queue.SimpleQueue[tuple[str, Any, BaseException | None]] = queue.SimpleQueue()
    first: BaseException | None = None

    def work(name: str) -> None:
        try:
            ended.put((name, calls[name](), None))
        except BaseException as error:
            ended.put((name, None, error))

    while waiting or running:
        for name in list(waiting):
            if not running or all(
                free.get(key, 0) >= amount for key, amount in demands[name].items()
            ):
                waiting.remove(name)
                running.add(name)
                _change(free, demands[name], -1)
                # A daemon: Ctrl-C must end the process although the others could go on.
                threading.Thread(target=work, args=(name,), name=name, daemon=True).start()
        name, result, error = ended.get()
        running.remove(name)
        _change(free, demands[name], +1)
        if error is None:
            done(result)
            continue
        if running or waiting:
            log.warning("%s failed, the others go on: %s", name, error)
        first = first or error
    if first is not None:
        raise first


def _change(free: dict[str, float], amounts: Resources, sign: int) -> None:
    for key, amount in amounts.items():
        free[key] = free.get(key, 0) + sign * amount
