"""What a call of the pipeline is given: prompts or their states, and seeds, brought into one form
or refused.

Shapes: B images, C latent channels, H x W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lidit.config.fields import check_prompts, check_seeds
from lidit.diffusion import initial_noise, seeded_generators
from lidit.errors import InputError
from lidit.models import TextStates

States = Mapping[str, TextStates]


@dataclass(frozen=True)
class Captions:
    """What images show: prompts, each distinct one read once, or their states; `rows` is each
    image's among them.
    """

    prompts: list[str] | None
    states: States | None
    rows: list[int]

    @classmethod
    def listed(cls, prompt: str | Sequence[str] | None, states: States | None) -> Captions:
        """One image of each. Raises InputError unless either prompts or states are given."""
        if (prompt is None) == (states is None):
            raise InputError("give either prompt or states")
        if states is not None:
            return cls(None, states, list(range(_captions(states))))
        assert prompt is not None
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("give at least one prompt")
        check_prompts(prompts, "the pipeline")
        row_of = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
        return cls(list(row_of), None, [row_of[text] for text in prompts])

    def repeated(self, times: int) -> Captions:
        """So many images of each caption, one after the other."""
        if times < 1:
            raise InputError(f"num_images_per_prompt: {times}: give 1 or more")
        return Captions(self.prompts, self.states, [row for row in self.rows for _ in range(times)])

    def spread(self, count: int) -> Captions:
        """One of these for each of `count` captions: itself, or the one that there is."""
        if len(self.rows) not in (1, count):
            raise InputError(
                f"{len(self.rows)} negative prompts for {count} prompts: give one, or one "
                "per prompt"
            )
        return (
            self
            if len(self.rows) == count
            else Captions(self.prompts, self.states, self.rows * count)
        )


def negative_captions(
    prompt: str | Sequence[str] | None, states: States | None, count: int
) -> Captions | None:
    """What guidance leads away from, for each of `count` captions; None for the model's own empty
    caption.
    """
    if prompt is None and states is None:
        return None
    if prompt is not None and states is not None:
        raise InputError("give either negative_prompt or negative_prompt_embeds")
    if isinstance(prompt, str) and not prompt:
        return None  # the model's own, as training used it
    return Captions.listed(prompt, states).spread(count)


def seed_per_image(seed: int | Sequence[int] | None, captions: int, each: int = 1) -> list[int]:
    """Seeds of `each` images per caption. One that is given per caption counts up over the
    caption's images.
    """
    count = captions * each
    if seed is None:
        return [int(value) for value in torch.randint(0, 2**31, (count,))]
    seeds = [seed] * captions if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) not in (captions, count):
        told = f"{captions} prompts" if each == 1 else f"{captions} prompts with {each} images each"
        raise InputError(f"{len(seeds)} seeds for {told}: give one, or one per prompt")
    if len(seeds) != count:
        seeds = [int(first) + place for first in seeds for place in range(each)]
    check_seeds(seeds, "the pipeline")
    return [int(value) for value in seeds]


def generators_per_image(
    generator: torch.Generator | Sequence[torch.Generator], count: int
) -> list[torch.Generator]:
    """One generator per image, or one that all draw from in turn."""
    generators = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != count:
        raise InputError(
            f"{len(generators)} generators for {count} images: give one, or one per image"
        )
    return generators


@dataclass(frozen=True)
class Randomness:
    """Where an image's noise comes from: its first, unless that is given, and what a scheduler adds
    on the way.
    """

    generators: list[torch.Generator]
    latents: torch.Tensor | None

    @classmethod
    def of(
        cls,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        seeds: Sequence[int],
        latents: torch.Tensor | None,
    ) -> Randomness:
        """From generators where they are given, else from a seed per image."""
        if generator is None:
            return cls(seeded_generators(seeds), latents)
        return cls(generators_per_image(generator, len(seeds)), latents)

    def noise(self, shape: tuple[int, int, int], device: torch.device) -> torch.Tensor:
        """[B, C, H, W]; raises InputError for latents of another shape."""
        if self.latents is None:
            return initial_noise(self.generators, shape, device)
        expected = (len(self.generators), *shape)
        if tuple(self.latents.shape) != expected:
            raise InputError(
                f"latents of shape {tuple(self.latents.shape)}: these images need {expected}"
            )
        return self.latents.to(device)


def size_of(
    latents: torch.Tensor | None, factor: int, height: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """Height and width in pixels: as given, else those of the latents, else None."""
    if latents is None or latents.ndim != 4 or height is not None or width is not None:
        return height, width
    return latents.shape[2] * factor, latents.shape[3] * factor


def _captions(states: States) -> int:
    return len(next(iter(states.values())).states)
