"""One worker's batches of a corpus, step by step, read ahead by threads; `open_feed` is the way in.

The batch of a step is a pure function of corpus, settings and step: a resumed run, or one with
another number of workers, sees the same global batches with the same noise.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lidit.config import DataSettings
from lidit.data.ahead import copied_ahead, with_tensors
from lidit.data.assembler import Assembler, TrainingBatch
from lidit.data.families import Families
from lidit.data.order import GlobalBatch, Order, shares
from lidit.data.rows import Part, Rows
from lidit.errors import InputError
from lidit.store import Corpus

AnyBatch_co = TypeVar("AnyBatch_co", covariant=True)


class Assembles(Protocol[AnyBatch_co]):
    """Makes the tensors of a part of a global batch."""

    def assemble(self, batch: GlobalBatch) -> AnyBatch_co: ...


class Batches(Protocol[AnyBatch_co]):
    """What a training steps through: one worker's samples `start` to `stop` of every global batch.

    `waited` are the seconds that `batches` has kept the training waiting.
    """

    start: int
    stop: int
    waited: float

    @property
    def steps_per_epoch(self) -> int: ...

    def batches(
        self, start: int, stop: int, device: torch.device | None = None
    ) -> Iterator[AnyBatch_co]: ...


class Feed(Generic[AnyBatch_co]):
    """One worker's part of the global batches, read ahead by threads. Made by `open_feed`.

    `waited` are the seconds that `batches` has waited for data: zero where reading keeps up.
    """

    def __init__(
        self,
        order: Order,
        assembler: Assembles[AnyBatch_co],
        rank: int,
        world_size: int,
        settings: DataSettings,
    ) -> None:
        self.order, self.assembler = order, assembler
        self.prefetch, self.readers = settings.prefetch_batches, settings.readers
        self._ordering = threading.Lock()  # the order caches its permutations in plain dictionaries
        share = shares(order.batch_size, world_size)[rank]
        self.start, self.stop = share.start, share.stop
        self.waited = 0.0  # seconds the training loop spent waiting for data
        # for units of a rolling family
        self.stop_waiting: Callable[[bool], None] = lambda stop: None

    def _make(self, step: int, pinned: bool) -> AnyBatch_co:
        with self._ordering:
            part = self.order.batch(step).slice(self.start, self.stop)
        batch = self.assembler.assemble(part)
        return with_tensors(batch, torch.Tensor.pin_memory) if pinned else batch

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the first epoch; later epochs may have one more per bucket, from leftovers."""
        return self.order.batches_before(1)

    def batches(
        self, start: int, stop: int, device: torch.device | None = None
    ) -> Iterator[AnyBatch_co]:
        """Read batches `start`, `start + 1`, ... `stop - 1`, over as many epochs as that takes.

        Args:
            start: The first step.
            stop: The step to stop before.
            device: A GPU to which each batch is copied while the one before it is worked on.
                Default: batches stay on the CPU.

        Returns:
            An iterator of batches, each [B, ...] for this worker's B samples.

        Raises:
            InputError: A file of the corpus is missing or damaged.
            JobError: A unit of a rolling family did not come in time.
        """
        on_gpu = device is not None and device.type == "cuda"
        read = self._read(start, stop, pinned=on_gpu)
        return copied_ahead(read, device) if device is not None and on_gpu else read

    def _read(self, start: int, stop: int, pinned: bool) -> Iterator[AnyBatch_co]:
        self.stop_waiting(False)
        with ThreadPoolExecutor(max_workers=self.readers, thread_name_prefix="feed") as pool:
            queue: deque[Future[AnyBatch_co]] = deque()
            upcoming = iter(range(start, stop))
            try:
                while True:
                    while (
                        len(queue) <= self.prefetch and (step := next(upcoming, None)) is not None
                    ):
                        queue.append(pool.submit(self._make, step, pinned))
                    if not queue:
                        return
                    began = time.perf_counter()
                    batch = queue.popleft().result()
                    self.waited += time.perf_counter() - began
                    yield batch
            finally:
                # Who leaves early must not wait for units that nobody will read.
                if queue:
                    self.stop_waiting(True)
                for future in queue:
                    future.cancel()


def open_feed(
    corpus: Corpus,
    settings: DataSettings,
    *,
    batch_size: int,
    part: Part = "train",
    rank: int = 0,
    world_size: int = 1,
    families: Families | None = None,
    coded: bool = False,
) -> Feed[TrainingBatch]:
    """Open one worker's stream of training batches over a corpus.

    The batch of a step depends on corpus, settings, `batch_size` and the step alone. Workers of any
    number share the same global batches, and `feed.batches(step, stop)` resumes at any step without
    replaying anything.

    Args:
        corpus: A corpus with at least one text family and one family of latents.
        settings: Seed, shuffling window, caption dropout, caption weights, held-out share; a
            recipe's `data` section.
        batch_size: Samples of a global batch, over all workers.
        part: "train", or "validation" for the held-out samples (`settings.validation_fraction`).
        rank: This worker's number, from 0 to world_size - 1.
        world_size: Workers that share each global batch.
        families: The latents and text states to read. Default: every text family of the corpus and
            its only latents.
        coded: Whether states of coded and int8 families stay whole steps, which a model turns into
            states where it computes (`conditioner.set_code`). Default: they become states here.

    Returns:
        A feed whose batches hold, for this worker's B samples: `latents` and `noise` [B, C, H, W]
        float32, scaled as the model sees them; `u` [B] float32 in [0, 1), to be turned into
        timesteps; `text`, encoder name -> states [B, T, W], mask [B, T] and prefix [P, W]; `keys`,
        the samples' names.

    Raises:
        InputError: The corpus has no images, no sample is held out, a family is missing, unfinished
            or ambiguous, or
            rank and batch size do not fit. While reading: a file is damaged.
    """
    if not 0 <= rank < world_size <= batch_size:
        raise InputError(
            f"open_feed: rank {rank} of {world_size} workers with batch_size={batch_size}; "
            "ranks run from 0 to "
            "world_size - 1, and every worker needs at least one sample of a batch"
        )
    rows = Rows(corpus, settings, part)
    if not rows.counts.any():
        raise InputError(
            f"{corpus.folder.location}: no sample is held out for part {part!r}; raise "
            "settings.validation_fraction"
        )
    families = families or Families.open(corpus, settings)
    assembler = Assembler(families, rows, settings, coded)
    # Validation draws a sample's noise by its place in the batch, which stays.
    by_unit = bool(settings.sort_by_unit) and part == "train"
    order = rows.order(batch_size, by_unit)
    feed = Feed(order, assembler, rank, world_size, settings)
    feed.stop_waiting = families.stop_waiting
    return feed


class FeedDataset(IterableDataset[Any]):
    """A feed's batches as a torch dataset: `DataLoader(FeedDataset(feed), batch_size=None)`.

    Batches are whole already, hence `batch_size=None`, and the feed reads ahead with threads of its
    own, hence `num_workers=0` (torch's default). Sharding over trainers is the feed's `rank` and
    `world_size`, not the loader's.

    Args:
        feed: What `open_feed` returns.
        start: The first step to yield; a resumed training gives the step it goes on with.
        stop: The step to stop before. Default: the end of the epoch in which `start` lies.

    Raises:
        InputError: When iterated in a worker process of a DataLoader: every worker would yield the
            same batches.
    """

    def __init__(self, feed: Feed[Any], start: int = 0, stop: int | None = None) -> None:
        order = feed.order
        end = order.batches_before(order.epoch_of(start) + 1) if stop is None else stop
        self.feed, self.start, self.stop = feed, start, end

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise InputError(
                "FeedDataset: use DataLoader(..., num_workers=0): the feed reads ahead with its "
                "own threads, and "
                "worker processes would all yield the same batches"
            )
        return self.feed.batches(self.start, self.stop)
