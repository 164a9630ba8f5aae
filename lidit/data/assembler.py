"""From a global batch's rows to a training step's tensors: reading, random numbers, collation.

Letters: B samples of this worker's part of a global batch; C, H, W channels, height, width of a
latent; T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from lidit.config import DataSettings
from lidit.data.families import Families
from lidit.data.order import GlobalBatch, shares
from lidit.data.rng import Purpose, draw, fill_gaussian, uniform
from lidit.data.rows import Rows
from lidit.models.states import TextStates


@dataclass(frozen=True)
class TrainingBatch:
    """One worker's part of global batch number `step`: B samples.

    Args:
        step: Number of the global batch.
        keys: The samples' names.
        latents: [B, C, H, W] float32, scaled as the model sees them.
        noise: [B, C, H, W] float32, the samples' own.
        u: [B] float32 in [0, 1), to be turned into timesteps by the objective.
        text: Encoder name -> states [B, T, W], mask [B, T] and prefix [P, W].
        tokens: Caption tokens of all encoders, without padding.
    """

    step: int
    keys: tuple[str, ...]
    latents: torch.Tensor  # [B, C, H, W] float32
    noise: torch.Tensor  # [B, C, H, W] float32
    u: torch.Tensor  # [B] float32 in [0, 1): the objective turns it into timesteps
    text: Mapping[str, TextStates]  # encoder -> states [B, T, W] and mask [B, T]
    tokens: int  # caption tokens of all encoders, without padding

    def to(self, device: torch.device) -> TrainingBatch:
        """Copy to a device.

        Args:
            device: Where to.

        Returns:
            The same batch on `device`.
        """
        text = {name: states.to(device) for name, states in self.text.items()}
        latents, noise, u = (t.to(device, non_blocking=True) for t in (self.latents, self.noise, self.u))
        return replace(self, latents=latents, noise=noise, u=u, text=text)

    def split(self, parts: int) -> list[TrainingBatch]:
        """Cut into slices, in order, for gradient accumulation.

        Args:
            parts: Number of slices.

        Returns:
            The slices, as equal as they can be.
        """
        return [
            TrainingBatch(
                step=self.step,
                keys=self.keys[cut],
                latents=self.latents[cut],
                noise=self.noise[cut],
                u=self.u[cut],
                text={n: replace(s, states=s.states[cut], mask=s.mask[cut]) for n, s in self.text.items()},
                tokens=self.tokens // parts,
            )
            for cut in shares(len(self.keys), parts)
        ]


class Assembler:
    """Makes the tensors of any part of a global batch, by (seed, epoch, sample) alone."""

    def __init__(self, families: Families, rows: Rows, settings: DataSettings) -> None:
        self.latents, self.texts = families.latents, families.texts
        self.rows, self.settings = rows, settings
        self.empty = {name: family.shared().empty for name, family in self.texts.items()}
        self.prefix = {name: family.shared().prefix for name, family in self.texts.items()}

    def assemble(self, batch: GlobalBatch) -> TrainingBatch:
        """The tensors of these rows, the same in a worker's part as in the whole batch."""
        # Random numbers first, each by its purpose, epoch, unit and row: independent of the order
        # of reading.
        seed, size = self.settings.seed, len(batch.row)
        pick = uniform(seed, Purpose.CAPTION, batch.epoch, batch.unit, batch.row)
        dropped = uniform(seed, Purpose.DROPOUT, batch.epoch, batch.unit, batch.row) < self.settings.caption_dropout
        u = uniform(seed, Purpose.TIMESTEP, batch.epoch, batch.unit, batch.row)
        posterior = draw(seed, Purpose.LATENT, batch.epoch, batch.unit, batch.row)

        keys: list[str] = [""] * size
        latents: list[torch.Tensor] = [torch.empty(0)] * size
        # A dropped caption is dropped for all LLMs: guidance compares with a prediction that has
        # no text at all.
        states = {name: [self.empty[name]] * size for name in self.texts}

        # Unit by unit, because a unit is one file per family: all its rows are read together.
        by_unit = np.argsort(batch.unit, kind="stable")
        for places in np.split(by_unit, np.flatnonzero(np.diff(batch.unit[by_unit])) + 1):
            unit = int(batch.unit[places[0]])
            self._verify(unit)
            info, members = self.rows.unit(unit), batch.row[places].tolist()
            read = self.latents.read(unit, members, seeds=posterior[places].tolist())
            for place, row, latent in zip(places.tolist(), members, read):
                keys[place], latents[place] = info.keys[row], latent
            kept = places[~dropped[places]]
            captions = info.choose(batch.row[kept], pick[kept]).tolist()
            for name, family in self.texts.items():
                for place, row_states in zip(kept.tolist(), family.read(unit, captions)):
                    states[name][place] = row_states

        stacked = torch.stack(latents)
        noise = torch.empty_like(stacked)
        fill_gaussian(noise, draw(seed, Purpose.NOISE, batch.epoch, batch.unit, batch.row))
        text = {name: collate(rows, self.prefix[name]) for name, rows in states.items()}
        return TrainingBatch(
            step=batch.step,
            keys=tuple(keys),
            latents=stacked,
            noise=noise,
            u=torch.from_numpy(u).float(),
            text=text,
            tokens=sum(len(row) for rows in states.values() for row in rows),
        )

    def _verify(self, unit: int) -> None:
        """Check the unit's files against their records, once per process, before they are used."""
        for family in (self.latents, *self.texts.values()):
            family.verify_unit(unit)


def collate(rows: list[torch.Tensor], prefix: torch.Tensor) -> TextStates:
    """`TextStates.collate` for rows of two dtypes, without copying a row twice.

    The empty caption is kept at the compute dtype, captions at the storage dtype; a batch has the
    wider one.
    """
    dtype = max({row.dtype for row in rows}, key=lambda dtype: torch.finfo(dtype).bits)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, T]
    states = torch.empty(*mask.shape, rows[0].shape[-1], dtype=dtype)  # [B, T, W]
    for padded, row in zip(states, rows):
        padded[: len(row)] = row
        padded[len(row) :] = 0
    return TextStates(states, mask, prefix)
