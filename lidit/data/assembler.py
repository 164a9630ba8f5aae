"""From a global batch's rows to a training step's tensors: reading, random numbers, collation.

Letters: B samples of this worker's part of a global batch; C, H, W channels, height, width of a
latent; T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lidit.config import DataSettings
from lidit.data.families import Families
from lidit.data.order import GlobalBatch, Ints, shares
from lidit.data.rng import Purpose, draw, fill_gaussian, uniform
from lidit.data.rows import Rows
from lidit.models.states import TextStates
from lidit.store import TextFamily
from lidit.store.coding.transform import exactly, standardise


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
        latents, noise, u = (
            t.to(device, non_blocking=True) for t in (self.latents, self.noise, self.u)
        )
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
                text={name: states.rows(cut) for name, states in self.text.items()},
                tokens=self.tokens // parts,
            )
            for cut in shares(len(self.keys), parts)
        ]


class Assembler:
    """Makes the tensors of any part of a global batch, by (seed, epoch, sample) alone.

    coded: whether states of coded and int8 families stay whole steps, for a model that knows how
    to read them.
    """

    def __init__(
        self, families: Families, rows: Rows, settings: DataSettings, coded: bool = False
    ) -> None:
        self.latents = families.latents
        self.rows, self.settings = rows, settings
        self.texts = {name: CaptionReader(family, coded) for name, family in families.texts.items()}

    def assemble(self, batch: GlobalBatch) -> TrainingBatch:
        """The tensors of these rows, the same in a worker's part as in the whole batch."""
        # Random numbers first, each by its purpose, epoch, unit and row: independent of the order
        # of reading.
        seed, size = self.settings.seed, len(batch.row)
        pick = uniform(seed, Purpose.CAPTION, batch.epoch, batch.unit, batch.row)
        dropped = (
            uniform(seed, Purpose.DROPOUT, batch.epoch, batch.unit, batch.row)
            < self.settings.caption_dropout
        )
        u = uniform(seed, Purpose.TIMESTEP, batch.epoch, batch.unit, batch.row)
        posterior = draw(seed, Purpose.LATENT, batch.epoch, batch.unit, batch.row)

        keys: list[str] = [""] * size
        latents: list[torch.Tensor] = [torch.empty(0)] * size
        # A dropped caption is dropped for all LLMs: guidance compares with a prediction that has
        # no text at all.
        states = {name: [reader.empty] * size for name, reader in self.texts.items()}

        # Unit by unit, because a unit is one file per family: all its rows are read together.
        by_unit = np.argsort(batch.unit, kind="stable")
        parts = np.split(by_unit, np.flatnonzero(np.diff(batch.unit[by_unit])) + 1)
        wanted = {
            int(batch.unit[places[0]]): self._captions(batch, places[~dropped[places]], pick)
            for places in parts
        }
        for reader in self.texts.values():
            reader.family.fetch(wanted)
        for places in parts:
            unit = int(batch.unit[places[0]])
            self.latents.verify_unit(unit)  # against its record, once per process
            info, members = self.rows.unit(unit), batch.row[places].tolist()
            read = self.latents.read(unit, members, seeds=posterior[places].tolist())
            for place, row, latent in zip(places.tolist(), members, read):
                keys[place], latents[place] = info.keys[row], latent
            kept = places[~dropped[places]]
            captions = wanted[unit]
            for name, reader in self.texts.items():
                for place, row_states in zip(kept.tolist(), reader.read(unit, captions)):
                    states[name][place] = row_states

        stacked = torch.stack(latents)
        noise = torch.empty_like(stacked)
        fill_gaussian(noise, draw(seed, Purpose.NOISE, batch.epoch, batch.unit, batch.row))
        text = {name: collate(rows, self.texts[name].prefix) for name, rows in states.items()}
        return TrainingBatch(
            step=batch.step,
            keys=tuple(keys),
            latents=stacked,
            noise=noise,
            u=torch.from_numpy(u).float(),
            text=text,
            tokens=sum(len(row.values) for rows in states.values() for row in rows),
        )

    def _captions(self, batch: GlobalBatch, kept: Ints, pick: NDArray[np.float64]) -> list[int]:
        """The captions that these samples of one unit are shown with."""
        if not len(kept):
            return []
        info = self.rows.unit(int(batch.unit[kept[0]]))
        chosen: list[int] = info.choose(batch.row[kept], pick[kept]).tolist()
        return chosen


class CaptionRow(NamedTuple):
    """One caption: its states [T, W], or its whole steps [T, W] and the size [T] of each token's
    step.
    """

    values: torch.Tensor
    size: torch.Tensor | None = None


class CaptionReader:
    """Captions of one text family as a batch takes them, each compared with its checksum."""

    def __init__(self, family: TextFamily, coded: bool) -> None:
        self.family, shared = family, family.shared()
        self.prefix = shared.prefix
        self.coded = coded and family.has_steps
        if self.coded:
            z = standardise(shared.empty, shared.mean, shared.deviation)
            self.empty = CaptionRow(*exactly(z, shared.code))
        else:
            self.empty = CaptionRow(shared.empty)

    def read(self, unit: int, rows: list[int]) -> list[CaptionRow]:
        """The captions of these rows."""
        if self.coded:
            return [CaptionRow(*found) for found in self.family.read_coded(unit, rows, check=True)]
        return [CaptionRow(found) for found in self.family.read(unit, rows, check=True)]


def collate(rows: list[CaptionRow], prefix: torch.Tensor) -> TextStates:
    """`TextStates.collate` for rows of two dtypes, without copying a row twice.

    The empty caption is kept at the compute dtype, captions at the storage dtype; a batch has the
    wider one.
    """
    lengths = torch.tensor([len(row.values) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, T]
    width = rows[0].values.shape[-1]
    dtype = max({row.values.dtype for row in rows}, key=lambda dtype: dtype.itemsize)
    states = torch.empty(*mask.shape, width, dtype=dtype)  # [B, T, W]
    size = None if rows[0].size is None else torch.zeros(mask.shape)  # [B, T]
    for place, row in enumerate(rows):
        states[place, : len(row.values)] = row.values
        if states.is_floating_point():  # of integers every one is a number
            states[place, len(row.values) :] = 0
        if size is not None and row.size is not None:
            size[place, : len(row.values)] = row.size
    return TextStates(states, mask, prefix, size)
