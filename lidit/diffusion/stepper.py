"""Rows of unlike requests advanced together: one step of each, in one forward pass.

A row is one image on its way, with its own sampler, scheduler state, step, guidance and seed. Rows
in a pass have one latent size; everything else may differ. `sample` walks a batch with one sampler;
here each row walks by itself, so a row may join or leave at any step.

Shapes: R rows, F rows of the pass (a guided row twice), U captions, C latent channels, H x W latent
size, S condition tokens, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from lidit.config import SamplerSettings
from lidit.diffusion.guidance import NO_NEGATIVE, acts_at, rescale
from lidit.diffusion.objectives import Objective
from lidit.diffusion.samplers import Walk, initial_noise, seeded_generators
from lidit.errors import InputError
from lidit.models import LIDiT, PromptCondition, TextStates

LEVELS_AT_ONCE = 64  # a schedule may have a thousand steps: the refiners take them in parts
LEVELS_KEPT = 4096


@dataclass(frozen=True)
class Padding:
    """What a pass is padded to: its rows and captions to a multiple of `rows`, a caption's tokens
    to one of `tokens`.

    A matrix product of another shape may round otherwise, so a row's bytes are the same for the
    same padded shapes only. Few shapes also compile few times. (1, 1) pads nothing.
    """

    rows: int = 1
    tokens: int = 1


@dataclass(frozen=True, eq=False)
class Caption:
    """States [T, W] per encoder, without the instruction, on the network's device; equal `key`,
    equal states.
    """

    key: str
    states: Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Row:
    """One image on its way. Guidance leads away from `negative`, or from nothing: `empty`, the
    condition of the empty caption at each step, is None where guidance never acts or has a negative
    caption. told: the network takes the scale as an input, in one pass.
    """

    caption: Caption
    sampler: SamplerSettings
    walk: Walk
    empty: PromptCondition | None
    negative: Caption | None = None
    told: bool = False

    @property
    def level(self) -> float:
        """t of the next step."""
        return self.walk.levels[self.walk.number]

    @property
    def guided(self) -> bool:
        """Whether the next step needs the prediction that guidance leads away from, too."""
        return not self.told and acts_at(self.sampler, self.level)

    @property
    def scale(self) -> float:
        """The guidance scale of the next step; 1 where guidance does not act."""
        return self.sampler.guidance_scale if acts_at(self.sampler, self.level) else 1.0


class Stepper:
    """The network, and what all rows share: prefixes, and the empty caption's condition of each
    schedule.

    Args:
        model, objective: of one trained model. empty: states of one empty caption per encoder, on
            the model's device.
    """

    def __init__(
        self,
        model: LIDiT,
        objective: Objective,
        empty: Mapping[str, TextStates],
        padding: Padding | None = None,
    ) -> None:
        self.model, self.objective = model, objective
        # asked once: diffusers looks through all modules for it
        self.device = torch.device(model.device)
        self.empty = dict(empty)
        self.padding = padding or Padding()
        self._schedules: OrderedDict[tuple[str, int], PromptCondition] = OrderedDict()
        self._collated: tuple[list[str], dict[str, TextStates]] = ([], {})

    def row(
        self,
        caption: Caption,
        sampler: SamplerSettings,
        seed: int,
        shape: tuple[int, int, int],
        negative: Caption | None = None,
    ) -> Row:
        """A row of latents [C, H, W] before its first step.

        Raises InputError for a sampler that does not fit, and for a negative caption that nothing
        would read.
        """
        told = self.model.takes_guidance
        if told and negative is not None:
            raise InputError(NO_NEGATIVE)
        generators = seeded_generators([seed])
        walk = Walk(
            self.objective, initial_noise(generators, shape, self.device), sampler, generators
        )
        guided = not told and any(acts_at(sampler, level) for level in walk.levels)
        empty = self._empty_condition(sampler, walk.levels) if guided and negative is None else None
        return Row(caption, sampler, walk, empty, negative, told)

    @torch.no_grad()
    def advance(self, rows: Sequence[Row], previewed: Collection[Row] = ()) -> list[torch.Tensor]:
        """Take one step of every row in one forward pass; the rows have one latent size.

        Returns the data [C, H, W] that the predictions of the `previewed` among the rows point to,
        in the rows' order.
        """
        # 1. Guided rows come a second time, with the empty or their negative caption; unguided rows
        #    do not.
        guided = [row for row in rows if row.guided]
        both = [*rows, *guided]  # F rows
        condition = self._condition(rows, guided)
        # 2. The pass, with as many repetitions of its first row as the padding asks for.
        latents = torch.cat([row.walk.latents for row in both])  # [F, C, H, W]
        t = torch.tensor([row.level for row in both]).to(self.device)  # [F]
        fill = torch.zeros(self._missing(len(both)), dtype=torch.long)
        places = torch.cat([torch.arange(len(both)), fill]).to(self.device)
        scales = (
            torch.tensor([row.scale for row in both]).to(self.device)[places]
            if self.model.takes_guidance
            else None
        )
        predicted = self.model.transformer(
            latents[places], t[places], condition.take(places), scales
        ).float()
        # 3. Each row's own guidance, then a step of its own scheduler.
        estimates = []
        for row, prediction in zip(rows, self._guide(rows, guided, predicted), strict=True):
            if row in previewed:
                estimates.append(row.walk.estimate(prediction)[0])
            row.walk.advance(prediction)
        return estimates

    def _guide(
        self, rows: Sequence[Row], guided: Sequence[Row], predicted: torch.Tensor
    ) -> list[torch.Tensor]:
        """The rows' predictions [1, C, H, W] from those of the pass, [F and padding, C, H, W]."""
        found = list(predicted[: len(rows)].split(1))
        if not guided:
            return found
        places = [place for place, row in enumerate(rows) if row.guided]
        conditional = torch.cat([found[place] for place in places])
        unconditional = predicted[len(rows) : len(rows) + len(guided)]
        scales = torch.tensor([row.sampler.guidance_scale for row in guided]).to(self.device)
        together = unconditional + scales[:, None, None, None] * (conditional - unconditional)
        for place, row, plain, contrasted in zip(
            places, guided, conditional.split(1), together.split(1), strict=True
        ):
            amount = row.sampler.guidance_rescale
            found[place] = rescale(contrasted, plain, amount) if amount > 0 else contrasted
        return found

    def _condition(self, rows: Sequence[Row], guided: Sequence[Row]) -> PromptCondition:
        """The condition of each of the F rows: a caption that rows share at one t is
        refined once.
        """
        places: dict[tuple[str, float], int] = {}
        captions: list[Caption] = []
        negative = [(row.negative, row.level) for row in guided if row.negative is not None]
        for caption, level in [*((row.caption, row.level) for row in rows), *negative]:
            if places.setdefault((caption.key, level), len(captions)) == len(captions):
                captions.append(caption)
        levels = [level for _, level in places]
        fill = self._missing(len(captions))
        text = self._text([*captions, *captions[:1] * fill])
        refined = self.model.conditioner(
            text, torch.tensor([*levels, *levels[:1] * fill]).to(self.device)
        )
        # The empty caption depends on t alone, and t on the schedule: its condition is there
        # already.
        parts, of_row = [refined], [places[row.caption.key, row.level] for row in rows]
        for row in guided:
            if row.negative is not None:
                of_row.append(places[row.negative.key, row.level])
                continue
            assert row.empty is not None
            parts.append(row.empty.take(slice(row.walk.number, row.walk.number + 1)))
            of_row.append(len(captions) + fill + len(parts) - 2)
        return PromptCondition.join(parts).take(torch.tensor(of_row).to(self.device))

    def _text(self, captions: Sequence[Caption]) -> dict[str, TextStates]:
        """The captions' states as one padded batch, kept until a row joins, leaves or parts from
        its caption.
        """
        keys = [caption.key for caption in captions]
        if keys != self._collated[0]:
            text = {}
            for name, empty in self.empty.items():
                entry = TextStates.collate(
                    [caption.states[name] for caption in captions], empty.prefix
                )
                tokens = entry.states.shape[1]
                text[name] = entry.pad_to(tokens + -tokens % self.padding.tokens).to(self.device)
            self._collated = (keys, text)
        return self._collated[1]

    def _missing(self, rows: int) -> int:
        return -rows % self.padding.rows

    def _levels_kept(self) -> int:
        return sum(len(condition.tokens) for condition in self._schedules.values())

    @torch.no_grad()
    def _empty_condition(
        self, sampler: SamplerSettings, levels: Sequence[float]
    ) -> PromptCondition:
        """The empty caption's condition at every step of a schedule, [steps, S, D]; computed once
        per schedule.
        """
        key = (self.objective.scheduler_name(sampler), sampler.steps)
        if key not in self._schedules:
            parts = []
            for first in range(0, len(levels), LEVELS_AT_ONCE):
                t = torch.tensor(levels[first : first + LEVELS_AT_ONCE]).to(self.device)
                text = {
                    name: TextStates(
                        entry.states.expand(len(t), -1, -1),
                        entry.mask.expand(len(t), -1),
                        entry.prefix,
                    )
                    for name, entry in self.empty.items()
                }
                parts.append(self.model.conditioner(text, t))
            self._schedules[key] = PromptCondition.join(parts)
            # Requests choose their steps: what is kept must not grow with their inventiveness.
            while len(self._schedules) > 1 and self._levels_kept() > LEVELS_KEPT:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(key)
        return self._schedules[key]
