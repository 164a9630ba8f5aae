"""The step loop: who takes part in the next step, and what becomes of the images after it. One
thread, no waiting.

Shapes: C latent channels, H x W latent size, n images of a request.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from lidit.config import SamplerSettings
from lidit.diffusion.stepper import Caption, Row, Stepper
from lidit.serving.profile import Size
from lidit.serving.request import OnPreview
from lidit.serving.turns import DeficitRoundRobin, line_up

# (latent size, rows, seconds) of a pass that was made. On a GPU, whose work is only begun here,
# seconds are right on average: its queue is short, so whoever fills it waits for it.
OnPass = Callable[[Size, int, float], None]


@dataclass(eq=False)
class Job:
    """A request that was accepted. `future` gets the latents [n, C, H, W]; whoever cancels it ends
    the job.
    """

    caption: Caption
    sampler: SamplerSettings
    seeds: Sequence[int]
    shape: tuple[int, int, int]
    pixels: int
    preview_steps: frozenset[int] = frozenset()
    on_preview: OnPreview | None = None
    negative: Caption | None = None
    told: bool = False  # the network takes the guidance scale as an input
    future: Future[torch.Tensor] = field(default_factory=Future)
    finished: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def units_of_step(self) -> int:
        """Compute units of one step of one image: its pixels, twice where the sampler guides in two
        passes.
        """
        return self.pixels * (1 if self.told or self.sampler.guidance_scale == 1 else 2)

    @property
    def units(self) -> int:
        """Compute units of the whole job."""
        return self.units_of_step * self.sampler.steps * len(self.seeds)


@dataclass(eq=False)
class Image:
    """One image of a job; its row, and with it the noise, exists from its first step on."""

    job: Job
    place: int
    row: Row | None = None

    @property
    def units(self) -> int:
        """Compute units that are left."""
        return self.job.units_of_step * (
            self.job.sampler.steps - (self.row.walk.number if self.row else 0)
        )


@dataclass
class Counts:
    """passes of the network; steps: of single images; rows: of the passes, where a guided image has
    two.
    """

    passes: int = 0
    steps: int = 0
    rows: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class StepLoop:
    """Images in queues by latent size; `turn` takes one step of some of them.

    Within a size the first to come are served, as many as `cap_of` allows. Short requests go before
    them, and no more than `brisk_of` allows go with them, so that long ones do not hold them up.
    Sizes share the device by compute units, pixels x rows of a pass. `on_pass` must not raise.
    """

    def __init__(
        self,
        stepper: Stepper,
        cap_of: Callable[[Size], int],
        on_pass: OnPass | None = None,
        brisk_of: Callable[[Size], int] | None = None,
    ) -> None:
        self.stepper, self.cap_of, self.on_pass = stepper, cap_of, on_pass
        self.brisk_of = brisk_of or cap_of
        self.counts = Counts()
        self._passes: Counter[Size] = Counter()  # of each queue since it was last empty
        self._queues: dict[Size, list[Image]] = {}
        self._turns: DeficitRoundRobin[Size] = DeficitRoundRobin()

    @property
    def units(self) -> int:
        """Compute units that wait or are in work."""
        return sum(image.units for queue in self._queues.values() for image in queue)

    def add(self, job: Job) -> None:
        queue = self._queues.setdefault(job.shape[1:], [])
        queue.extend(Image(job, place) for place in range(len(job.seeds)))

    def turn(self) -> bool:
        """Take one step of the images whose turn it is; False where there are none."""
        self._drop_settled()
        if not self._queues:
            return False
        chosen = {}
        for size in list(self._queues):
            try:
                chosen[size] = self._next_of(size)
            except Exception as error:
                self._fail({image.job for image in self._queues.pop(size)}, error)
        if chosen:
            costs = {
                size: images[0].job.pixels * _weight(images) for size, images in chosen.items()
            }
            self._step(chosen[self._turns.choose(costs)])
        return True

    def cancel_all(self) -> None:
        """End every job as if its owner had cancelled it."""
        for queue in self._queues.values():
            for image in queue:
                image.job.future.cancel()
        self._drop_settled()

    def fail_all(self, error: BaseException) -> None:
        """End every job with `error`."""
        self._fail({image.job for queue in self._queues.values() for image in queue}, error)
        self._queues.clear()

    def _drop_settled(self) -> None:
        """Cancelled and failed jobs leave before anything is computed for them."""
        for size, queue in list(self._queues.items()):
            gone = {image.job for image in queue if image.job.future.cancelled()}
            self.counts.cancelled += len(gone)
            queue[:] = [image for image in queue if not image.job.future.done()]
            if not queue:
                del self._queues[size], self._passes[size]

    def _next_of(self, size: Size) -> list[Image]:
        """The images of a queue whose rows fit into its next pass; one image always does."""
        queue = self._queues[size]
        order, brisk = line_up([image.job.units for image in queue], self._passes[size] % 2 == 0)
        left = self.brisk_of(size) if brisk else self.cap_of(size)
        chosen: list[Image] = []
        for image in (queue[place] for place in order):
            if image.row is None:
                job = image.job
                seed = job.seeds[image.place]
                image.row = self.stepper.row(
                    job.caption, job.sampler, seed, job.shape, job.negative
                )
            left -= _weight([image])
            if chosen and left < 0:
                break
            chosen.append(image)
        return chosen

    def _step(self, images: Sequence[Image]) -> None:
        rows = [image.row for image in images if image.row is not None]
        shown = [
            image
            for image in images
            if image.row and image.row.walk.number + 1 in image.job.preview_steps
        ]
        size, weight, began = images[0].job.shape[1:], _weight(images), time.perf_counter()
        self.counts.passes += 1
        self._passes[size] += 1
        self.counts.rows += weight
        try:
            estimates = self.stepper.advance(rows, {image.row for image in shown if image.row})
        except Exception as error:  # of these images alone: the others go on
            self._fail({image.job for image in images}, error)
            return
        self.counts.steps += len(images)
        if self.on_pass is not None:
            self.on_pass(size, weight, time.perf_counter() - began)
        for image, estimate in zip(shown, estimates, strict=True):
            self._show(image, estimate)
        for image in images:
            if image.row and image.row.walk.finished:
                self._finish(image)

    def _show(self, image: Image, estimate: torch.Tensor) -> None:
        assert image.row is not None
        if image.job.on_preview is None or image.job.future.done():
            return
        try:
            image.job.on_preview(image.place, image.row.walk.number, estimate)
        except Exception as error:
            self._fail({image.job}, error)

    def _finish(self, image: Image) -> None:
        """The image leaves its queue; with the last one its job is done."""
        job, row = image.job, image.row
        assert row is not None
        self._queues[job.shape[1:]].remove(image)
        job.finished[image.place] = row.walk.latents[0]
        if len(job.finished) < len(job.seeds) or job.future.done():
            return
        # From here on nobody can cancel; False: somebody just has.
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(
                torch.stack([job.finished[place] for place in range(len(job.seeds))])
            )
            self.counts.finished += 1
        else:
            self.counts.cancelled += 1

    def _fail(self, jobs: set[Job], error: BaseException) -> None:
        for job in jobs:
            if not job.future.done() and job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)
                self.counts.failed += 1


def _weight(images: Sequence[Image]) -> int:
    """Rows of a pass that images need: two where guidance acts."""
    return sum(2 if image.row and image.row.guided else 1 for image in images)
