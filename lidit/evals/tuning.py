"""A race of samplers: which settings draw best for how many evaluations of the network.

All candidates of a round draw the same prompts from the same seeds, so two are compared picture by
picture. After a round a candidate leaves that another one beats surely, for no more evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lidit.config import SamplerSettings
from lidit.config.tune import TuneSettings
from lidit.diffusion import Objective
from lidit.diffusion.guidance import acts_at
from lidit.errors import InputError
from lidit.evals.statistics import Interval, bootstrap_overall
from lidit.plots import new_panels, save_figure

LEAST_PROMPTS = 4


@dataclass
class Candidate:
    """A sampler, what a picture costs with it, and its pictures' scores so far, in the prompts'
    order.
    """

    sampler: SamplerSettings
    evaluations: int
    scores: list[float] = field(default_factory=list)
    running: bool = True

    @property
    def label(self) -> str:
        s = self.sampler
        low, high = s.guidance_interval
        inside = "" if (low, high) == (0, 1) else f" in [{low:g}, {high:g}]"
        guidance = (
            "no guidance" if s.guidance_scale == 1 else f"guidance {s.guidance_scale:g}{inside}"
        )
        return f"{s.steps} steps, {s.scheduler}, {guidance}"

    def mean(self, tags: Sequence[str]) -> float:
        """The score without its interval, which takes long for many candidates."""
        names, scores = np.array(tags[: len(self.scores)]), np.array(self.scores)
        return float(
            np.mean([scores[names == name].mean() for name in dict.fromkeys(names.tolist())])
        )

    def score(self, tags: Sequence[str]) -> Interval:
        """Unweighted mean over categories, as `lidit evaluate` has it; one picture per prompt."""
        count = len(self.scores)
        return bootstrap_overall(self.scores, tags[:count], list(range(count)))


def evaluations_of(
    objective: Objective, sampler: SamplerSettings, takes_guidance: bool = False
) -> int:
    """Evaluations of the network for one picture: a step where guidance acts has two, unless it is
    an input.
    """
    levels = objective.sampling_timesteps(objective.scheduler(sampler)).tolist()
    return sum(2 if acts_at(sampler, level) and not takes_guidance else 1 for level in levels)


def candidates(
    settings: TuneSettings, objective: Objective, takes_guidance: bool = False
) -> list[Candidate]:
    """Every combination once: without guidance there are no intervals, and two that guide the same
    steps are one.

    Raises InputError where no scheduler of the settings can run the objective.
    """
    found: dict[tuple[object, ...], Candidate] = {}
    for name in settings.schedulers:
        resolved = objective.schedulers[0] if name == "auto" else name
        if resolved not in objective.schedulers:
            continue
        for steps in settings.steps:
            for scale in settings.guidance_scales:
                for interval in settings.guidance_intervals:
                    sampler = SamplerSettings(
                        steps=steps,
                        scheduler=resolved,
                        guidance_scale=scale,
                        guidance_interval=interval,
                    )
                    levels = objective.sampling_timesteps(objective.scheduler(sampler)).tolist()
                    guided = tuple(acts_at(sampler, level) for level in levels)
                    key = (resolved, steps, scale if any(guided) else 1.0, guided)
                    cost = evaluations_of(objective, sampler, takes_guidance)
                    found.setdefault(key, Candidate(sampler, cost))
    if not found:
        raise InputError(
            "schedulers: none of these can sample the objective; it has "
            f"{', '.join(objective.schedulers)}"
        )
    return sorted(found.values(), key=lambda candidate: candidate.evaluations)


def drop_beaten(running: Sequence[Candidate], tags: Sequence[str]) -> None:
    """End the race for every candidate that another one beats surely on the same pictures, for no
    more evaluations.

    Of too few prompts of a category an interval says nothing: nobody leaves.
    """
    if min(tags.count(tag) for tag in set(tags)) < LEAST_PROMPTS:
        return
    best = front(running, tags)
    for candidate in running:
        # Its rival is the best of those that cost no more: whom that one does not beat, none does.
        rival = [c for c in best if c.evaluations <= candidate.evaluations][-1]
        if rival is not candidate and gain(rival, candidate, tags).low > 0:
            candidate.running = False


def gain(one: Candidate, other: Candidate, tags: Sequence[str]) -> Interval:
    """How much better `one` draws than `other`, over the pictures that both have drawn."""
    count = min(len(one.scores), len(other.scores))
    difference = np.array(one.scores[:count]) - np.array(other.scores[:count])
    return bootstrap_overall(difference, tags[:count], list(range(count)))


def front(finalists: Sequence[Candidate], tags: Sequence[str]) -> list[Candidate]:
    """Those of which no other has a higher score for no more evaluations, by rising evaluations."""
    best = -np.inf
    chosen: list[Candidate] = []
    for candidate in sorted(finalists, key=lambda c: (c.evaluations, -c.mean(tags))):
        if (value := candidate.mean(tags)) > best:
            best = value
            chosen.append(candidate)
    return chosen


def recommended(finalists: Sequence[Candidate], tags: Sequence[str], margin: float) -> Candidate:
    """The cheapest that is surely worse than the best one by no more than `margin`.

    Few pictures prove nothing: then it is the best one, not the one of which least is known.
    """
    best = max(finalists, key=lambda candidate: candidate.mean(tags))
    even = [c for c in finalists if c is best or gain(best, c, tags).high <= margin]
    return min(even, key=lambda c: (c.evaluations, -c.mean(tags)))


def pareto_table(shown: Sequence[Candidate], chosen: Candidate, tags: Sequence[str]) -> str:
    """Markdown: evaluations against score, a row each."""
    lines = ["| evaluations | sampler | score | prompts |", "|---|---|---|---|"]
    for candidate in shown:
        mark = "**" if candidate is chosen else ""
        lines.append(
            f"| {candidate.evaluations} | {mark}{candidate.label}{mark} | {candidate.score(tags)} "
            f"| {len(candidate.scores)} |"
        )
    return "\n".join(lines)


def plot_pareto(
    path: Path, groups: Mapping[str, Sequence[Candidate]], line: str, tags: Sequence[str]
) -> None:
    """Evaluations against score with 95 % intervals; the candidates of the group
    `line` are joined.
    """
    figure, (axes,) = new_panels((7, 4.5))
    for name, group in groups.items():
        scores = [candidate.score(tags) for candidate in group]
        if not scores:
            continue
        values = np.array([score.value for score in scores])
        spread = [values - [s.low for s in scores], np.array([s.high for s in scores]) - values]
        joined = name == line
        style: dict[str, Any] = (
            {"marker": "o"} if joined else {"marker": ".", "linestyle": "none", "alpha": 0.4}
        )
        axes.errorbar(
            [c.evaluations for c in group], values, yerr=spread, capsize=2, label=name, **style
        )
    axes.set(
        xscale="log",
        xlabel="evaluations of the network per picture",
        ylabel="score",
        ylim=(-0.02, 1.02),
    )
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path)
