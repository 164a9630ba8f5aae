"""Results of an ablation's arms, over seeds, and what they say about the paper's orderings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lidit.errors import InputError
from lidit.evals.ablation.paper import CLAIMS, Claim
from lidit.evals.statistics import Interval, mean_over_seeds

RESULT_FILE = "result.json"
Verdict = Literal["holds", "does not hold", "cannot be told"]


@dataclass(frozen=True)
class Measured:
    """One kind of error in one caption style: `by_position` has the accuracy of the cases with the
    error there.
    """

    accuracy: float
    gap: float
    by_position: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """An arm at one step: measures by name ("binding, clauses") and the loss on the held-out
    scenes, per timestep.
    """

    step: int
    measures: dict[str, Measured]
    loss: dict[str, float]

    @property
    def accuracy(self) -> float:
        return float(np.mean([measured.accuracy for measured in self.measures.values()]))

    @property
    def gap(self) -> float:
        return float(np.mean([measured.gap for measured in self.measures.values()]))

    @property
    def validation_loss(self) -> float:
        return float(np.mean(list(self.loss.values())))


@dataclass(frozen=True)
class ArmResult:
    """One arm with one seed. `identity` says what it was computed from; `losses`: (step, training
    loss).
    """

    identity: str
    arm: str
    seed: int
    parameters: int
    seconds: float
    losses: tuple[tuple[int, float], ...]
    points: tuple[Point, ...]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{RESULT_FILE}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(folder / RESULT_FILE)

    @classmethod
    def load(cls, folder: Path) -> ArmResult | None:
        """The result in `folder`; None where there is none. Raises InputError for one that cannot
        be read.
        """
        path = folder / RESULT_FILE
        if not path.is_file():
            return None
        try:
            tree = json.loads(path.read_text())
            points = tuple(
                Point(
                    point["step"],
                    {
                        name: Measured(one["accuracy"], one["gap"], tuple(one["by_position"]))
                        for name, one in point["measures"].items()
                    },
                    point["loss"],
                )
                for point in tree.pop("points")
            )
            losses = tuple((int(step), float(loss)) for step, loss in tree.pop("losses"))
            return cls(**tree, losses=losses, points=points)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not an arm's result ({error}); delete the arm's folder and run again"
            ) from None

    def metrics(self) -> dict[int, dict[str, float]]:
        """Step -> flat numbers for a tracker."""
        found: dict[int, dict[str, float]] = {step: {"loss": loss} for step, loss in self.losses}
        for point in self.points:
            flat = {
                "accuracy": point.accuracy,
                "gap": point.gap,
                "validation/loss": point.validation_loss,
            }
            for name, measured in point.measures.items():
                key = name.replace(", ", "/")
                flat |= {f"{key}/accuracy": measured.accuracy, f"{key}/gap": measured.gap}
                flat |= {
                    f"{key}/accuracy_position_{i + 1}": v
                    for i, v in enumerate(measured.by_position)
                }
            found.setdefault(point.step, {}).update(flat)
        return found


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds, with Student's t intervals.

    `learning` is the accuracy averaged over all points, the area under the learning curve: it tells
    arms apart that all end at the same accuracy. `drop`: accuracy at the first segment minus at the
    last, mean over points.
    """

    arm: str
    seeds: int
    parameters: int
    learning: Interval
    final: Interval
    gap: Interval
    validation_loss: Interval
    by_position: tuple[Interval, ...]
    drop: Interval


def summaries(results: Sequence[ArmResult]) -> dict[str, ArmSummary]:
    """One summary per arm, in the order in which the arms were met."""
    found = {}
    for arm in dict.fromkeys(result.arm for result in results):
        chosen = [result for result in results if result.arm == arm]
        positions = np.array([_positions(result) for result in chosen])  # [seeds, segments]
        found[arm] = ArmSummary(
            arm=arm,
            seeds=len(chosen),
            parameters=chosen[0].parameters,
            learning=mean_over_seeds([learning(result) for result in chosen], 0, 1),
            final=mean_over_seeds([result.points[-1].accuracy for result in chosen], 0, 1),
            gap=mean_over_seeds([result.points[-1].gap for result in chosen]),
            validation_loss=mean_over_seeds(
                [result.points[-1].validation_loss for result in chosen], 0
            ),
            by_position=tuple(mean_over_seeds(column.tolist(), 0, 1) for column in positions.T),
            drop=mean_over_seeds((positions[:, 0] - positions[:, -1]).tolist()),
        )
    return found


def learning(result: ArmResult) -> float:
    """Accuracy averaged over the points of training."""
    return float(np.mean([point.accuracy for point in result.points]))


def _positions(result: ArmResult) -> list[float]:
    """Accuracy per segment, mean over measures and points."""
    rows = [measured.by_position for point in result.points for measured in point.measures.values()]
    return [float(value) for value in np.mean(np.array(rows), axis=0)]


@dataclass(frozen=True)
class Comparison:
    """`learning`, `final`, `gap`, `loss`: better minus worse in learning, final accuracy, final
    loss gap and final validation loss, paired by seed.

    `saturated`: both arms end so near to perfect that their order is a matter of speed alone.
    """

    claim: Claim
    learning: Interval
    final: Interval
    gap: Interval
    loss: Interval
    verdict: Verdict
    saturated: bool


def compare(results: Sequence[ArmResult], claims: Sequence[Claim] = CLAIMS) -> list[Comparison]:
    """Every claim both of whose arms were run with at least one common seed."""
    by_run = {(result.arm, result.seed): result for result in results}
    found = []
    for claim in claims:
        seeds = [
            seed for arm, seed in by_run if arm == claim.better and (claim.worse, seed) in by_run
        ]
        if not seeds:
            continue
        pairs = [(by_run[claim.better, seed], by_run[claim.worse, seed]) for seed in seeds]
        speed = mean_over_seeds([learning(a) - learning(b) for a, b in pairs])
        ends = np.array([[one.points[-1].accuracy for one in pair] for pair in pairs])  # [seeds, 2]
        final = mean_over_seeds((ends[:, 0] - ends[:, 1]).tolist())
        gap = mean_over_seeds([a.points[-1].gap - b.points[-1].gap for a, b in pairs])
        loss = mean_over_seeds(
            [a.points[-1].validation_loss - b.points[-1].validation_loss for a, b in pairs]
        )
        decisive = final if claim.by == "final" else speed
        found.append(
            Comparison(
                claim,
                speed,
                final,
                gap,
                loss,
                verdict(decisive),
                bool(ends.mean(axis=0).min() > 0.97),
            )
        )
    return found


def verdict(difference: Interval) -> Verdict:
    """Holds or not where the 95 % interval leaves zero out; otherwise the data cannot tell."""
    if difference.low > 0:
        return "holds"
    return "does not hold" if difference.high < 0 else "cannot be told"
