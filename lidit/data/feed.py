"""From a corpus to the tensors of a training step: draws, reading, collation, prefetching.

Letters: B samples of this worker's part of a global batch; C, H, W channels, height, width of a latent.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from lidit.config import DataSettings
from lidit.data.draws import Purpose, draw, gaussian, uniform
from lidit.data.order import GlobalBatch, Order
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
        """Equal slices, in order, for gradient accumulation."""
        size = len(self.keys) // parts
        cuts = [slice(start, start + size) for start in range(0, len(self.keys), size)]
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
            for cut in cuts
        ]


class Assembler:
    """Makes the tensors of any part of a global batch; every number depends on (seed, epoch, sample) alone."""

    def __init__(
        self, corpus: Corpus, latents: LatentFamily, texts: Mapping[str, TextFamily], rows: Rows, settings: DataSettings
    ) -> None:
        self.corpus, self.latents, self.texts, self.rows, self.settings = corpus, latents, texts, rows, settings
        self.empty = {name: family.shared().empty for name, family in texts.items()}
        self.prefix = {name: family.shared().prefix for name, family in texts.items()}

    def assemble(self, batch: GlobalBatch) -> TrainingBatch:
        seed, size = self.settings.seed, len(batch.row)
        pick = uniform(seed, Purpose.CAPTION, batch.epoch, batch.unit, batch.row)
        dropped = uniform(seed, Purpose.DROPOUT, batch.epoch, batch.unit, batch.row) < self.settings.caption_dropout
        u = uniform(seed, Purpose.TIMESTEP, batch.epoch, batch.unit, batch.row)
        keys: list[str] = [""] * size
        latents: list[torch.Tensor] = [torch.empty(0)] * size
        states: dict[str, list[torch.Tensor]] = {name: [torch.empty(0)] * size for name in self.texts}
        for unit in sorted(set(batch.unit.tolist())):
            self._verify(unit)
            info = self.rows.unit(unit)
            places = [int(i) for i in (batch.unit == unit).nonzero()[0]]
            members = [int(batch.row[i]) for i in places]
            seeds = [int(draw(seed, Purpose.LATENT, int(batch.epoch[i]), unit, int(batch.row[i]))) for i in places]
            for place, row, latent in zip(places, members, self.latents.read(unit, members, seeds=seeds)):
                keys[place], latents[place] = info.keys[row], latent
            told = [place for place in places if not dropped[place]]
            captions = [info.choose(int(batch.row[place]), float(pick[place])) for place in told]
            for name, family in self.texts.items():
                for place, row_states in zip(told, family.read(unit, captions)):
                    states[name][place] = row_states
        for name, rows in states.items():
            for place in dropped.nonzero()[0].tolist():  # the same samples for all LLMs
                rows[place] = self.empty[name]
        shape = tuple(latents[0].shape)
        drawn = zip(batch.epoch.tolist(), batch.unit.tolist(), batch.row.tolist())
        noise = [gaussian(shape, seed, Purpose.NOISE, *sample) for sample in drawn]
        text = {name: TextStates.collate(_same_dtype(rows), self.prefix[name]) for name, rows in states.items()}
        return TrainingBatch(
            step=batch.step,
            keys=tuple(keys),
            latents=torch.stack(latents),
            noise=torch.stack(noise),
            u=torch.from_numpy(u).float(),
            text=text,
            tokens=sum(int(padded.mask.sum()) for padded in text.values()),
        )

    def _verify(self, unit: int) -> None:
        """Every file of the unit against its record, once per process, before a number of it is used."""
        for family in (self.latents, *self.texts.values()):
            family.verify_unit(unit)


def _same_dtype(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """The empty caption is kept at the compute dtype, captions at the storage dtype; a batch has one."""
    dtype = max((row.dtype for row in rows), key=lambda dtype: torch.finfo(dtype).bits)
    return [row.to(dtype) for row in rows]


class Feed:
    """This worker's part of the global batches `start`, `start + 1`, ... `stop - 1`, prefetched by threads."""

    def __init__(self, order: Order, assembler: Assembler, rank: int, world_size: int, prefetch: int) -> None:
        self.order, self.assembler, self.prefetch = order, assembler, prefetch
        share = order.batch_size // world_size
        self.start, self.stop = rank * share, (rank + 1) * share
        self.waited = 0.0  # seconds the training loop spent waiting for data

    def batches(self, start: int, stop: int) -> Iterator[TrainingBatch]:
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="feed") as pool:
            queue: deque[Future[TrainingBatch]] = deque()
            upcoming = iter(range(start, stop))
            try:
                while True:
                    while len(queue) <= self.prefetch and (step := next(upcoming, None)) is not None:
                        part = self.order.batch(step).slice(self.start, self.stop)
                        queue.append(pool.submit(self.assembler.assemble, part))
                    if not queue:
                        return
                    began = time.perf_counter()
                    batch = queue.popleft().result()
                    self.waited += time.perf_counter() - began
                    yield batch
            finally:
                for future in queue:
                    future.cancel()
