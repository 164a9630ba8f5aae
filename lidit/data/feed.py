"""From a corpus to the tensors of a training step: draws, reading, collation, prefetching.

Letters: B samples of this worker's part of a global batch; C, H, W channels, height, width of a latent.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from lidit.config import DataSettings
from lidit.data.order import GlobalBatch, Order, shares
from lidit.data.rng import Purpose, draw, fill_gaussian, uniform
from lidit.data.rows import Rows
from lidit.models.states import TextStates
from lidit.store import Corpus, LatentFamily, TextFamily


@dataclass(frozen=True)
class TrainingBatch:
    step: int
    keys: tuple[str, ...]
    latents: torch.Tensor  # [B, C, H, W] float32
    noise: torch.Tensor  # [B, C, H, W] float32
    u: torch.Tensor  # [B] float32 in [0, 1): the objective turns it into timesteps
    text: Mapping[str, TextStates]
    tokens: int

    def to(self, device: torch.device) -> TrainingBatch:
        text = {name: states.to(device) for name, states in self.text.items()}
        latents, noise, u = (t.to(device, non_blocking=True) for t in (self.latents, self.noise, self.u))
        return replace(self, latents=latents, noise=noise, u=u, text=text)

    def split(self, parts: int) -> list[TrainingBatch]:
        """Slices, in order, for gradient accumulation."""
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
    """Makes the tensors of any part of a global batch; every number depends on (seed, epoch, sample) alone."""

    def __init__(
        self, corpus: Corpus, latents: LatentFamily, texts: Mapping[str, TextFamily], rows: Rows, settings: DataSettings
    ) -> None:
        self.corpus, self.latents, self.texts, self.rows, self.settings = corpus, latents, texts, rows, settings
        self.empty = {name: family.shared().empty for name, family in texts.items()}
        self.prefix = {name: family.shared().prefix for name, family in texts.items()}
        for family in (latents, *texts.values()):  # a batch at a window's border reads from both windows
            family.keep_open = max(family.keep_open, 2 * settings.window_units)

    def assemble(self, batch: GlobalBatch) -> TrainingBatch:
        seed, size = self.settings.seed, len(batch.row)
        pick = uniform(seed, Purpose.CAPTION, batch.epoch, batch.unit, batch.row)
        dropped = uniform(seed, Purpose.DROPOUT, batch.epoch, batch.unit, batch.row) < self.settings.caption_dropout
        u = uniform(seed, Purpose.TIMESTEP, batch.epoch, batch.unit, batch.row)
        posterior = draw(seed, Purpose.LATENT, batch.epoch, batch.unit, batch.row)
        keys: list[str] = [""] * size
        latents: list[torch.Tensor] = [torch.empty(0)] * size
        # Dropped are the captions of the same samples for all LLMs.
        states = {name: [self.empty[name]] * size for name in self.texts}
        by_unit = np.argsort(batch.unit, kind="stable")
        for places in np.split(by_unit, np.flatnonzero(np.diff(batch.unit[by_unit])) + 1):
            unit = int(batch.unit[places[0]])
            self._verify(unit)
            info, members = self.rows.unit(unit), batch.row[places].tolist()
            read = self.latents.read(unit, members, seeds=posterior[places].tolist())
            for place, row, latent in zip(places.tolist(), members, read):
                keys[place], latents[place] = info.keys[row], latent
            told = places[~dropped[places]]
            captions = info.choose(batch.row[told], pick[told]).tolist()
            for name, family in self.texts.items():
                for place, row_states in zip(told.tolist(), family.read(unit, captions)):
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
        """Every file of the unit against its record, once per process, before a number of it is used."""
        for family in (self.latents, *self.texts.values()):
            family.verify_unit(unit)


def collate(rows: list[torch.Tensor], prefix: torch.Tensor) -> TextStates:
    """`TextStates.collate` for rows of two dtypes, without copying a row twice.

    The empty caption is kept at the compute dtype, captions at the storage dtype; a batch has the wider one.
    """
    dtype = max({row.dtype for row in rows}, key=lambda dtype: torch.finfo(dtype).bits)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # [B, T]
    states = torch.empty(*mask.shape, rows[0].shape[-1], dtype=dtype)  # [B, T, W]
    for padded, row in zip(states, rows):
        padded[: len(row)] = row
        padded[len(row) :] = 0
    return TextStates(states, mask, prefix)


AnyBatch_co = TypeVar("AnyBatch_co", covariant=True)


class Assembles(Protocol[AnyBatch_co]):
    """Makes the tensors of a part of a global batch."""

    def assemble(self, batch: GlobalBatch) -> AnyBatch_co: ...


class Feed(Generic[AnyBatch_co]):
    """This worker's part of the global batches, prefetched by `readers` threads."""

    def __init__(
        self,
        order: Order,
        assembler: Assembles[AnyBatch_co],
        rank: int,
        world_size: int,
        prefetch: int,
        readers: int = 2,
    ) -> None:
        self.order, self.assembler, self.prefetch, self.readers = order, assembler, prefetch, readers
        self._ordering = threading.Lock()  # the order keeps what it has worked out, in plain dictionaries
        share = shares(order.batch_size, world_size)[rank]
        self.start, self.stop = share.start, share.stop
        self.waited = 0.0  # seconds the training loop spent waiting for data

    def _make(self, step: int) -> AnyBatch_co:
        with self._ordering:
            part = self.order.batch(step).slice(self.start, self.stop)
        return self.assembler.assemble(part)

    def batches(self, start: int, stop: int) -> Iterator[AnyBatch_co]:
        """Batches `start`, `start + 1`, ... `stop - 1`."""
        with ThreadPoolExecutor(max_workers=self.readers, thread_name_prefix="feed") as pool:
            queue: deque[Future[AnyBatch_co]] = deque()
            upcoming = iter(range(start, stop))
            try:
                while True:
                    while len(queue) <= self.prefetch and (step := next(upcoming, None)) is not None:
                        queue.append(pool.submit(self._make, step))
                    if not queue:
                        return
                    began = time.perf_counter()
                    batch = queue.popleft().result()
                    self.waited += time.perf_counter() - began
                    yield batch
            finally:
                for future in queue:
                    future.cancel()
