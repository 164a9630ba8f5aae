"""An ablation: one corpus, many arms, one report. An arm that has a result is not trained again.

Arms with one worker train side by side as Ray tasks, as many as the cluster holds; arms with
several go through the ordinary training, one after the other. Every arm is a run below the
ablation's own in the tracker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from lidit.config.ablation import Ablation
from lidit.config.settings import flatten
from lidit.datasets.scenes.captions import CaptionStyles
from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
from lidit.diffusion import build_objective
from lidit.errors import InputError
from lidit.evals.ablation.report import LEARNING_PLOT, write_ablation_report
from lidit.evals.ablation.results import RESULT_FILE, ArmResult, Point
from lidit.store import Corpus, digest_of
from lidit.store.files.owner import owned
from pipelines import tracking
from pipelines.ablation.arm import ArmJob, train_arm
from pipelines.ablation.eval_set import EvalSet
from pipelines.chain import run_chain
from pipelines.evaluation.models import load_pipeline
from pipelines.runtime import resources
from pipelines.runtime.progress import ProgressBar
from pipelines.tracking.origin import DESCRIPTION
from pipelines.training.train import run_facts, train

TRACKED = "tracked"  # a file in an arm's folder, made when the tracker has all of its numbers
Report = Callable[[str], None]


@dataclass(frozen=True)
class AblationSummary:
    """`trained` arms (with their seeds) by this call, `found` finished before it."""

    page: Path
    trained: int
    found: int
    tracking_uri: str


def run_ablation(ablation: Ablation, report: Report = print) -> AblationSummary:
    """Make the scenes, the corpus, every arm and the report. Call again after any interruption.

    report: called with a line for every finished arm. Raises InputError for settings that do not
    fit together, before anything is computed; JobError where an arm fails, after the arms beside
    it are done.
    """
    folder = ablation.recipe.run_folder.resolve()
    ablation = _absolute(ablation, folder)
    _check_machine(ablation)
    with owned(folder, "filled by an ablation"):
        return _run(ablation, folder, report)


def prepare_arms(ablation: Ablation) -> list[ArmJob]:
    """All that `run_ablation` makes before the first arm: scenes, corpus, states of the cases.

    For arms that are trained elsewhere; with their results in their folders `run_ablation` writes
    the report.
    """
    folder = ablation.recipe.run_folder.resolve()
    ablation = _absolute(ablation, folder)
    _check_machine(ablation)
    with owned(folder, "filled by an ablation"):
        eval_set = EvalSet.of(ablation, folder / "cases")
        corpus = _prepare(ablation, folder)
        jobs = _jobs(ablation, eval_set, corpus)
        _encode_cases(jobs, corpus)
    return jobs


def _run(ablation: Ablation, folder: Path, report: Report) -> AblationSummary:
    # One corpus and one eval set for every arm and seed: arms differ by their settings alone.
    eval_set = EvalSet.of(ablation, folder / "cases")
    corpus = _prepare(ablation, folder)
    jobs = _jobs(ablation, eval_set, corpus)
    uri = tracking.store_uri(ablation.recipe.tracking.uri, folder.parent)
    judged = _judged_on(ablation, corpus, eval_set)

    # An arm is finished by the file in its folder, whatever the tracker has of it.
    results = {job.name: result for job in jobs if (result := _finished(job)) is not None}
    pending = [job for job in jobs if job.name not in results]

    # The report is written after every arm: an early look already compares what is trained.
    key = digest_of({"ablation": ablation.recipe.name, "output": str(folder)})[:32]
    params = flatten(ablation)
    about = (
        f"{len(ablation.arms)} arms of {len(ablation.seeds)} seeds over "
        f"`{ablation.recipe.corpus}`, judged on {judged}. Folder: `{folder}`."
    )
    name, experiment = ablation.recipe.name, ablation.recipe.tracking.experiment
    with tracking.tracked_run(
        uri, experiment, name, key, params, {"lidit.job": "ablate", DESCRIPTION: about}, folder
    ) as parent:
        for job in jobs:
            # a kill or an outage between its result and the tracker
            if job.name in results and not _tracked(job):
                _track(job, results[job.name], uri, experiment, parent.handle.run_id)
        _encode_cases(pending, corpus)
        with ProgressBar(f"ablate {name}", len(jobs), "arms", start=len(results)) as progress:
            for job, result in _results(pending, ablation, uri, parent.handle.run_id):
                results[job.name] = result
                _track(job, result, uri, experiment, parent.handle.run_id)
                progress.advance(1, f"{job.name}: accuracy {result.points[-1].accuracy:.3f}")
                page = _write(ablation, corpus, folder, results, jobs, judged)
                report(f"{job.name}: final accuracy {result.points[-1].accuracy:.3f}, {page}")
        page = _write(ablation, corpus, folder, results, jobs, judged)
        parent.artifact(page.parent, "report")
        parent.picture(page.parent / LEARNING_PLOT)
    return AblationSummary(page, len(pending), len(jobs) - len(pending), uri)


def _check_machine(ablation: Ablation) -> None:
    """Refuse, before the corpus is made, what cannot run here; without Ray if all is finished."""
    folders = (
        ablation.arm_recipe(arm, seed).run_folder
        for arm in ablation.arms
        for seed in ablation.seeds
    )
    if all((folder / RESULT_FILE).is_file() for folder in folders):
        return
    resources.connect()
    resources.check_engine(ablation.recipe.engine)
    for encoder in ablation.recipe.encoders:
        resources.check_resources(
            ablation.recipe.pool_of(encoder.name).model_copy(update={"actors": 1})
        )


def _absolute(ablation: Ablation, folder: Path) -> Ablation:
    """Paths that mean the same to workers started in other folders."""
    corpus = (
        ablation.recipe.corpus
        if "://" in ablation.recipe.corpus
        else str(Path(ablation.recipe.corpus).resolve())
    )
    changes = {"output": str(folder.parent), "corpus": corpus, "sources": (str(folder / "scenes"),)}
    return ablation.model_copy(update={"recipe": ablation.recipe.model_copy(update=changes)})


def _prepare(ablation: Ablation, folder: Path) -> Corpus:
    """The corpus with the states of every encoder and the latents."""
    scenes = ablation.scenes
    styles = CaptionStyles(original=scenes.styles, synthetic=())
    weights = dict.fromkeys(scenes.tags, 1.0)
    scene_set = SceneSet(
        scenes.count, scenes.size, scenes.seed, scenes.layout, categories=weights, styles=styles
    )
    write_scene_shards(folder / "scenes", scene_set)
    run_chain(ablation.recipe, lambda stage, summary: None, until="latents")
    return Corpus.open(ablation.recipe.corpus)


def _jobs(ablation: Ablation, eval_set: EvalSet, corpus: Corpus) -> list[ArmJob]:
    """Every arm with every seed, seed by seed, so that an early look already compares all arms."""
    jobs = []
    for seed in ablation.seeds:
        for arm in ablation.arms:
            recipe = ablation.arm_recipe(arm, seed)
            facts = run_facts(recipe, corpus)
            points = ablation.measures.points if recipe.engine.workers == 1 else 1
            identity = digest_of({"facts": facts, "cases": eval_set.digest, "points": points})
            jobs.append(
                ArmJob(
                    arm, seed, identity, recipe, facts["text"], facts["latents"], eval_set, points
                )
            )
    return jobs


def _finished(job: ArmJob) -> ArmResult | None:
    result = ArmResult.load(job.folder)
    if result is not None and result.identity != job.identity:
        raise InputError(
            f"{job.folder}: holds a result of other settings or data; give the ablation another "
            "recipe.name, or "
            "delete the folder"
        )
    return result


def _encode_cases(pending: list[ArmJob], corpus: Corpus) -> None:
    """Encode the cases' captions by every LLM that a pending arm needs, once per LLM."""
    wanted = {
        job.texts[encoder.name]: (job, encoder)
        for job in pending
        for encoder in job.recipe.encoders
    }
    if not wanted:
        return
    resources.connect()
    tasks = []
    for fingerprint, (job, encoder) in wanted.items():
        pool = job.recipe.pool_of(encoder.name)
        task = _encode.options(**resources.demands(pool))
        tasks.append(task.remote(job.eval_set, corpus.folder.location, encoder, fingerprint))
    _get(tasks)


@ray.remote
def _encode(eval_set: EvalSet, corpus: str, encoder: Any, fingerprint: str) -> None:
    eval_set.encode(Corpus.open(corpus), encoder, fingerprint)


def _results(
    pending: list[ArmJob], ablation: Ablation, uri: str, parent: str
) -> Iterator[tuple[ArmJob, ArmResult]]:
    """Yield each arm's result as it is ready; `uri` and `parent`: where several workers track."""
    if not pending:
        return
    engine = ablation.recipe.engine
    if engine.workers > 1:
        for job in pending:
            yield job, _train_with_workers(job, uri, parent)
        return
    resources.connect()
    task = ray.remote(
        max_retries=engine.max_failures, **resources.demands(resources.worker_pool(engine))
    )(train_arm)
    waiting = list(pending)
    running: dict[Any, ArmJob] = {}
    limit = _side_by_side(engine.cpus_per_worker)
    first: Exception | None = None
    while running or (waiting and first is None):
        while waiting and len(running) < limit and first is None:
            job = waiting.pop(0)
            running[task.remote(job)] = job
        (ready,), _ = ray.wait(list(running))
        job = running.pop(ready)
        try:
            (result,) = _get([ready])
        except Exception as error:  # arms keep no checkpoint, so those that are running may finish
            first = first or error
            continue
        yield job, result
    if first is not None:
        raise first


def _side_by_side(cpus: float) -> int:
    """Arms at once. On a cluster Ray queues them; an embedded Ray counts logical CPUs, and two
    trainings on one real CPU gain nothing.
    """
    if os.environ.get(resources.CLUSTER_ADDRESS):
        return 1000
    return max(1, int((os.cpu_count() or 1) // max(cpus, 1)))


def _get(tasks: list[Any]) -> list[Any]:
    with resources.plain_errors("an arm's worker died; finished arms are kept"):
        return list(ray.get(tasks))


def _train_with_workers(job: ArmJob, uri: str, parent: str) -> ArmResult:
    """Train an arm of several workers by `train` and measure its end; seconds are this call's."""
    started = time.monotonic()
    tracked = job.recipe.tracking.model_copy(update={"uri": uri})
    trained = train(
        job.recipe.model_copy(update={"tracking": tracked}),
        tags={tracking.PARENT: parent} if parent else {},
    )
    task = _measure.options(**resources.demands(resources.worker_pool(job.recipe.engine)))
    ((point, parameters),) = _get([task.remote(job, trained.model, trained.step)])
    result = ArmResult(
        job.identity, job.arm, job.seed, parameters, time.monotonic() - started, (), (point,)
    )
    result.save(job.folder)
    return result


@ray.remote
def _measure(job: ArmJob, model: Path, step: int) -> tuple[Point, int]:
    """A trained arm judged where its workers ran, for the driver may have no GPU; and its number of
    parameters.
    """
    pipe = load_pipeline(model)
    loss = job.eval_set.loss(
        pipe.model, build_objective(job.recipe.objective), Corpus.open(job.recipe.corpus), job.texts
    )
    return job.eval_set.measure(loss, job.eval_set.images(), step), pipe.model.num_parameters()


def _track(job: ArmJob, result: ArmResult, uri: str, experiment: str, parent: str) -> None:
    tags = {
        "lidit.job": "arm",
        "lidit.arm": job.arm,
        "lidit.seed": str(job.seed),
        **({tracking.PARENT: parent} if parent else {}),
    }
    key = digest_of({"arm": job.identity, "folder": str(job.folder)})[:32]
    with tracking.tracked_run(
        uri, experiment, job.name, key, flatten(job.recipe), tags, job.folder
    ) as run:
        for step, values in sorted(result.metrics().items()):
            run.metrics(values, step)
    if not (job.folder / tracking.OUTBOX).exists():
        (job.folder / TRACKED).touch()


def _tracked(job: ArmJob) -> bool:
    """Whether the tracker has all of a finished arm's numbers."""
    return (job.folder / TRACKED).exists()


def _write(
    ablation: Ablation,
    corpus: Corpus,
    folder: Path,
    results: dict[str, ArmResult],
    jobs: list[ArmJob],
    judged: str,
) -> Path:
    missing = [job.name for job in jobs if job.name not in results]
    in_order = [results[job.name] for job in jobs if job.name in results]
    facts = _facts(ablation, corpus, judged, in_order)
    return write_ablation_report(
        folder / "report", in_order, f"Ablation {ablation.recipe.name}", facts, missing
    )


def _judged_on(ablation: Ablation, corpus: Corpus, eval_set: EvalSet) -> str:
    """What the arms are judged on, for the report. Call once: it reads all captions."""
    measures = ablation.measures
    trained = {
        text
        for unit in range(corpus.num_units)
        for text in corpus.captions(unit)["text"].to_pylist()
    }
    judged = {case.caption for cases in eval_set.measures.values() for case in cases}
    return (
        f"{measures.scenes} scenes of {measures.tag} per style; errors: "
        f"{', '.join(measures.kinds)}; "
        f"{len(judged & trained)} of their {len(judged)} captions occur in training, with other "
        "scenes"
    )


def _facts(
    ablation: Ablation, corpus: Corpus, judged: str, results: list[ArmResult]
) -> dict[str, str]:
    scenes, recipe = ablation.scenes, ablation.recipe
    encoders = ", ".join(
        f"{encoder.name} ({encoder.model}, {encoder.kind})" for encoder in recipe.encoders
    )
    styles = ", ".join(f"`{style}`" for style in scenes.styles)
    visible = recipe.model.visible_tokens
    return {
        "scenes": f"{scenes.count} of categories {', '.join(scenes.tags)}, {scenes.size} px, "
        f"layout {scenes.layout}",
        "captions": styles,
        **(
            {"seen by the transformer": f"the first {visible} tokens of a caption"}
            if visible
            else {}
        ),
        "training": f"{recipe.train.steps} steps of {recipe.train.batch_size}, objective "
        f"{recipe.objective.kind}, "
        f"lr {recipe.train.optimizer.lr:g}",
        "seeds": ", ".join(str(seed) for seed in ablation.seeds),
        "judged on": judged,
        "measured": f"{len(results[0].points)} times in a training, the last at its end"
        if results
        else "not yet",
        "encoders": encoders,
        "corpus": corpus.digest[:12],
        "time": f"{sum(result.seconds for result in results) / 60:.0f} minutes of arms in all",
    }
