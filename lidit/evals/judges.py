"""How drawn pictures are scored one by one, for comparisons of samplers: by program, or by the
model's own losses.

Shapes: B pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.errors import InputError
from lidit.evals.classifier.binding import TIMESTEPS, loss_table, wins
from lidit.evals.classifier.caption_loss import pipeline_latents, pipeline_loss
from lidit.evals.scenes.scorer import score_image
from lidit.pipeline import LIDiTPipeline, image_bytes

LOSSES_AT_ONCE = 64


@dataclass(frozen=True)
class Prompt:
    """What is drawn; scores of one tag are averaged first. record: what its judge knows besides."""

    text: str
    tag: str
    record: Mapping[str, Any]


class Judge(Protocol):
    """Scores between 0 and 1. name: of what is measured."""

    name: str

    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
        """Images [B, 3, height, width] in [0, 1] and the prompts they were drawn for."""
        ...


class SceneJudge:
    """The scene benchmark's strict rule."""

    name = "strict score"

    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
        drawn = image_bytes(images)
        return [
            float(score_image(image, prompt.record).strict)
            for image, prompt in zip(drawn, prompts, strict=True)
        ]


class CaptionJudge:
    """Whether the model itself has a lower loss of the picture under its own caption than under
    another one.
    """

    name = "caption preference"

    def __init__(self, pipe: LIDiTPipeline, captions: Sequence[str]) -> None:
        self.pipe, self.loss = pipe, pipeline_loss(pipe, captions)

    @torch.no_grad()
    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[float]:
        latents = pipeline_latents(self.pipe, images * 2 - 1)
        own, other = (
            loss_table(self.loss, latents, captions, TIMESTEPS, LOSSES_AT_ONCE, seed=0).mean(axis=1)
            for captions in ([p.text for p in prompts], [str(p.record["other"]) for p in prompts])
        )
        scores: list[float] = wins(other - own).tolist()
        return scores


def scene_prompts(
    pipe: LIDiTPipeline, layout: str, seed: int, per_tag: int, tags: tuple[str, ...]
) -> list[Prompt]:
    """The benchmark's prompts of the model's size."""
    items = benchmark_prompts(pipe.config.height, layout, seed, per_tag, tags)
    return [Prompt(item["prompt"], item["tag"], item) for item in items]


def caption_prompts(captions: Sequence[str], origin: str) -> list[Prompt]:
    """Distinct captions, each with the next one, going round, as the other. Raises InputError for
    fewer than two.
    """
    texts = list(dict.fromkeys(caption.strip() for caption in captions if caption.strip()))
    if len(texts) < 2:
        raise InputError(
            f"{origin}: {len(texts)} distinct captions; give a file with two or more, one per line"
        )
    return [
        Prompt(text, "captions", {"other": other})
        for text, other in zip(texts, [*texts[1:], texts[0]])
    ]
