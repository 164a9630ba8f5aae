"""What is asked of the engine.

Shapes: T caption tokens, W width of an LLM, C latent channels, H x W latent size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lidit.config import SamplerChanges

# The image's place in its request, steps taken, and the data [C, H, W] that the latents point to.
OnPreview = Callable[[int, int, torch.Tensor], None]


@dataclass(frozen=True, eq=False)
class Request:
    """Images of one prompt, one per seed, of one size and with one sampler.

    Args:
        states: encoder name -> the prompt's states [T, W], as `PromptCache.states` gives them.
        seeds: one per image. sampler: what differs from the model's own. height, width: pixels;
            None: training size.
        previews: how often `on_preview` is called for an image, at equal distances before its last
            step.
        negative: states of a prompt that guidance leads away from; None: from the empty caption, as
            in training.
    """

    states: Mapping[str, torch.Tensor]
    seeds: Sequence[int]
    sampler: SamplerChanges = field(default_factory=SamplerChanges)
    height: int | None = None
    width: int | None = None
    previews: int = 0
    on_preview: OnPreview | None = None
    negative: Mapping[str, torch.Tensor] | None = None


def states_key(states: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of a prompt's states: requests of the same words share the refiners' work, and no
    word is kept.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(states.items()):
        digest.update(f"{name} {entry.dtype} {tuple(entry.shape)}\n".encode())
        digest.update(entry.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """After which steps an image is shown: `previews` at equal distances, never after the last
    step.
    """
    at = {math.ceil(number * steps / (previews + 1)) for number in range(1, previews + 1)}
    return frozenset(step for step in at if step < steps)
