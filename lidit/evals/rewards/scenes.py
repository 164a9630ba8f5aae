"""The scene scorer as a reward: does the picture show what its record says, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from lidit.config.align import RewardSettings
from lidit.errors import InputError
from lidit.evals.rewards.base import Pictures, Record
from lidit.evals.scenes.scorer import SceneScore, score_image

TRUTH = "geneval"  # the key under which a scene's sample keeps its record
WRONG_AT_MOST = 0.5  # of a wrong picture, so that none comes near a right one


class SceneReward:
    """1 where the strict rule is met. Otherwise 0, or with `rule: partial` half the share of the
    clauses met.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self.partial, self.layout = settings.rule == "partial", settings.layout

    def __call__(self, pictures: Pictures, records: Sequence[Record]) -> list[float]:
        return [
            self._of(score_image(picture, self._item(record)))
            for picture, record in zip(pictures, records)
        ]

    def _item(self, record: Record) -> Record:
        if TRUTH not in record:
            raise InputError(
                "reward.kind: 'scenes' needs samples that know their scene, but that of "
                f"{record['prompt']!r} has no "
                f"{TRUTH!r}; use a corpus of lidit scenes, or another reward"
            )
        return {**record[TRUTH], "layout": self.layout}

    def _of(self, score: SceneScore) -> float:
        if score.strict:
            return 1.0
        return WRONG_AT_MOST * sum(score.clauses) / len(score.clauses) if self.partial else 0.0
