"""Which sampler a model should have: candidates race on prompts, their pictures judged by program
or by the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lidit.config import SamplerSettings, TrackingSettings
from lidit.config.fields import LARGEST_SEED
from lidit.config.settings import flatten
from lidit.config.tune import TuneSettings
from lidit.errors import InputError
from lidit.evals.judges import (
    CaptionJudge,
    Judge,
    Prompt,
    SceneJudge,
    caption_prompts,
    scene_prompts,
)
from lidit.evals.statistics import Interval
from lidit.evals.suites.targets import read_lines
from lidit.evals.tuning import (
    Candidate,
    candidates,
    drop_beaten,
    front,
    pareto_table,
    plot_pareto,
    recommended,
)
from lidit.models import TextStates
from lidit.pipeline import LIDiTPipeline
from lidit.store import digest_of
from pipelines.evaluation.models import load_pipeline, model_identity
from pipelines.evaluation.scenes import RULES
from pipelines.evaluation.scorecard import Job, Scorecard
from pipelines.runtime.progress import ProgressBar

SCORES, TABLE, PLOT = "tune-sampler.json", "tune-sampler.md", "tune-sampler.png"


@dataclass(frozen=True)
class Tuning:
    """sampler: the cheapest that the best one does not surely beat. score: its own. spent:
    evaluations in all.
    """

    sampler: SamplerSettings
    evaluations: int
    score: Interval
    spent: int
    table: str
    folder: Path
    computed: bool


def tune_sampler(
    model: Path, settings: TuneSettings, tracker: TrackingSettings, out: Path
) -> Tuning:
    """Race the candidates until prompts or budget are used up; nothing is done again for the same
    weights and settings.

    Raises InputError where `model` is no model folder, or the budget is less than a single round.
    """
    # The model's own sampler is none of what this depends on: candidates bring theirs.
    identified = {name: value for name, value in model_identity(model).items() if name != "sampler"}
    made_with: dict[str, Any] = {
        "model": identified,
        "settings": settings.model_dump(mode="json") | RULES,
    }
    if settings.captions is not None:
        made_with["captions"] = digest_of(read_lines(Path(settings.captions)))
    job = Job.of_model(
        "tune sampler", model, "tune-sampler", flatten(settings), "tune_sampler", SCORES
    )
    card = Scorecard(out, job, made_with, tracker)
    if known := card.known("sampler", "evaluations", "score", "spent", "table"):
        sampler, score = (
            SamplerSettings.model_validate(known["sampler"]),
            Interval(**known["score"]),
        )
        return Tuning(
            sampler,
            known["evaluations"],
            score,
            known["spent"],
            known["table"],
            out,
            computed=False,
        )

    with card.evaluating():
        pipe = load_pipeline(model)
        racing = candidates(settings, pipe.objective, pipe.model.takes_guidance)
        tags, spent = _race(pipe, racing, settings)
        # Those that came to the end have drawn the same pictures; of the others less is known.
        finalists = [candidate for candidate in racing if candidate.running]
        chosen = recommended(finalists, tags, settings.margin)
        best = front(finalists, tags)
        shown = sorted({id(c): c for c in [*best, chosen]}.values(), key=lambda c: c.evaluations)
        table = pareto_table(shown, chosen, tags)

        card.begin()
        (out / TABLE).write_text(
            f"{table}\n\nEvery candidate:\n\n{pareto_table(racing, chosen, tags)}\n"
        )
        plot_pareto(out / PLOT, {"left the race": [c for c in racing if not c.running],
                                 "at the end": finalists,
                                 "best for their evaluations": best}, "best for their evaluations",
                                 tags)  # fmt: skip
        score = chosen.score(tags)
        record = {
            "identity": card.identity,
            "made_with": made_with,
            "sampler": chosen.sampler.model_dump(mode="json"),
            "evaluations": chosen.evaluations,
            "score": asdict(score),
            "spent": spent,
            "table": table,
            "candidates": [_described(candidate, tags) for candidate in racing],
        }
        card.publish(
            {"score": score.value, "evaluations": chosen.evaluations, "spent": spent},
            [TABLE, PLOT],
            record,
        )
        return Tuning(chosen.sampler, chosen.evaluations, score, spent, table, out, computed=True)


def _described(candidate: Candidate, tags: Sequence[str]) -> dict[str, Any]:
    return {
        "sampler": candidate.sampler.model_dump(mode="json"),
        "evaluations": candidate.evaluations,
        "score": asdict(candidate.score(tags)),
        "prompts": len(candidate.scores),
        "to_the_end": candidate.running,
    }


def _prompts(pipe: LIDiTPipeline, settings: TuneSettings) -> tuple[list[list[Prompt]], Judge]:
    """The prompts of every round, as many of each category in each, and who scores
    their pictures.
    """
    count = settings.per_round * settings.rounds
    if settings.captions is None:
        prompts = scene_prompts(pipe, settings.layout, settings.seed, count, settings.tags)
        judge: Judge = SceneJudge()
    else:
        prompts = caption_prompts(
            read_lines(Path(settings.captions))[: count + 1], settings.captions
        )[:count]
        judge = CaptionJudge(
            pipe, [text for p in prompts for text in (p.text, str(p.record["other"]))]
        )
    by_tag: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_tag.setdefault(prompt.tag, []).append(prompt)
    each = settings.per_round
    rounds = [
        [p for group in by_tag.values() for p in group[n * each : (n + 1) * each]]
        for n in range(settings.rounds)
    ]
    return [chosen for chosen in rounds if chosen], judge


def _race(
    pipe: LIDiTPipeline, racing: Sequence[Candidate], settings: TuneSettings
) -> tuple[list[str], int]:
    """Rounds until the prompts are used up or the next round would cost too much; the prompts'
    tags, what was spent.
    """
    tags: list[str] = []
    spent = 0
    rounds, judge = _prompts(pipe, settings)
    with ProgressBar("race", settings.evaluations, "evaluations") as progress:
        for prompts in rounds:
            running = [candidate for candidate in racing if candidate.running]
            cost = len(prompts) * sum(candidate.evaluations for candidate in running)
            if spent + cost > settings.evaluations:
                break
            states = pipe.encode_prompts([prompt.text for prompt in prompts])
            seeds = [
                (settings.seed * 1_000_003 + len(tags) + place) & LARGEST_SEED
                for place in range(len(prompts))
            ]
            drawn = Round(prompts, states, seeds)
            for candidate in running:
                candidate.scores += _scores(
                    pipe, judge, candidate.sampler, drawn, settings.batch_size
                )
                spent += candidate.evaluations * len(prompts)
                progress.update(spent)
            tags += [prompt.tag for prompt in prompts]
            drop_beaten(running, tags)
    if not tags:
        raise InputError(
            f"evaluations: {settings.evaluations} are less than the {cost} of one round; give "
            "more, fewer candidates "
            "(steps=[...]) or fewer prompts (per_round=1)"
        )
    return tags, spent


@dataclass(frozen=True)
class Round:
    """Prompts with their states and seeds, the same for all candidates."""

    prompts: Sequence[Prompt]
    states: dict[str, TextStates]
    seeds: Sequence[int]


def _scores(
    pipe: LIDiTPipeline, judge: Judge, sampler: SamplerSettings, drawn: Round, batch_size: int
) -> list[float]:
    """Of one picture per prompt."""
    found: list[float] = []
    for start in range(0, len(drawn.prompts), batch_size):
        part = slice(start, start + batch_size)
        images = pipe(
            states={
                n: TextStates(s.states[part], s.mask[part], s.prefix)
                for n, s in drawn.states.items()
            },
            seed=list(drawn.seeds[part]),
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance_scale,
            guidance_interval=sampler.guidance_interval,
            guidance_rescale=0.0,
            scheduler=sampler.scheduler,
            output_type="pt",
        ).images
        found += judge.score(images, drawn.prompts[part])
    return found
