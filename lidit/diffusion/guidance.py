"""Classifier-free guidance in one batched forward.

Shapes: B batch, C latent channels, H x W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lidit.config import SamplerSettings
from lidit.models import LIDiT, TextStates

ROUNDING = 1e-6


class GuidedPredictor:
    """predict(x_t, t) for `sample`: unconditional + scale * (conditional - unconditional).

    Both run as the two halves of one batch, in which a caption of several images, such as the empty
    one, is refined once. Outside the guidance interval (its ends belong to it), or at scale 1, only
    the captions run. A model that takes the scale as an input is asked once.

    Args:
        model: the network. text: states of R captions per encoder.
        empty: of N captions that guidance leads away from: the empty one, or what a picture should
            not show.
        sampler: guidance_scale, guidance_interval (timesteps, 0 data, 1 noise), guidance_rescale
            (arXiv 2305.08891).
        rows: each image's caption, B indices; None: one image each, B = R.
        empty_rows: each image's caption of `empty`, B indices; None: the one that there is.
    Raises:
        ValueError: `empty` is not of one caption, and `empty_rows` does not choose.
    """

    def __init__(
        self,
        model: LIDiT,
        text: Mapping[str, TextStates],
        empty: Mapping[str, TextStates],
        sampler: SamplerSettings,
        rows: Sequence[int] | None = None,
        empty_rows: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.text = dict(text)
        self.both: dict[str, TextStates] = {}
        self.both_rows: torch.Tensor | None = None
        states = next(iter(text.values())).states
        own = torch.arange(len(states)) if rows is None else torch.tensor(rows)  # [B]
        self.rows = None if rows is None else own.to(states.device)
        count = max((len(entry.states) for entry in empty.values()), default=1)  # N
        if count != 1 and empty_rows is None:
            raise ValueError("the empty caption is one for all images: give its states once")
        if sampler.guidance_scale != 1 and not model.takes_guidance:
            away = torch.zeros_like(own) if empty_rows is None else torch.tensor(empty_rows)  # [B]
            self.both = {name: empty[name].stack(text[name]) for name in text}  # N + R captions
            self.both_rows = torch.cat([away, count + own]).to(states.device)  # [2 B]

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t [B, C, H, W], t [B] the same value throughout -> float32 prediction [B, C, H, W]."""
        if self.model.takes_guidance:
            scale = self.sampler.guidance_scale if self._guided_at(t) else 1.0
            return self.model(x_t, t, self.text, self.rows, torch.full_like(t, scale)).float()
        if not self.both or not self._guided_at(t):
            return self.model(x_t, t, self.text, self.rows).float()
        doubled = self.model(torch.cat([x_t, x_t]), torch.cat([t, t]), self.both, self.both_rows)
        unconditional, conditional = doubled.float().chunk(2)
        guided = unconditional + self.sampler.guidance_scale * (conditional - unconditional)
        if self.sampler.guidance_rescale > 0:
            return rescale(guided, conditional, self.sampler.guidance_rescale)
        return guided

    def _guided_at(self, t: torch.Tensor) -> bool:
        if self.sampler.guidance_interval == (0, 1):
            return True  # without waiting for the GPU to tell t
        return acts_at(self.sampler, float(t[0]))


NO_NEGATIVE = (
    "this model takes the guidance scale as an input and has nothing that a negative prompt "
    "could lead away from: "
    "leave it out, or draw with the model that it was distilled from"
)


def acts_at(sampler: SamplerSettings, level: float) -> bool:
    """Whether guidance acts at a timestep: it has a scale, and the timestep is in its interval,
    ends included.
    """
    low, high = sampler.guidance_interval
    # A timestep is a float32: 0.8 as one lies above the 0.8 of the settings.
    return sampler.guidance_scale != 1 and low - ROUNDING <= level <= high + ROUNDING


def rescale(guided: torch.Tensor, conditional: torch.Tensor, amount: float) -> torch.Tensor:
    """Pull each sample's deviation back to the conditional prediction's (arXiv 2305.08891,
    section 3.4).
    """
    dims = tuple(range(1, guided.dim()))
    # A prediction that is the same everywhere has no deviation: it stays as it is.
    own = guided.std(dim=dims, keepdim=True).clamp_min(torch.finfo(guided.dtype).tiny)
    matched = guided * (conditional.std(dim=dims, keepdim=True) / own)
    return amount * matched + (1 - amount) * guided
