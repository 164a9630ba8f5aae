"""The engine: a model's step loop in a thread of its own, fed by any number of other threads.

Shapes: C latent channels, H x W latent size, n images of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from threading import Condition, Thread
from types import TracebackType
from typing import Self

import torch

from lidit.diffusion.stepper import Padding
from lidit.errors import JobError
from lidit.pipeline import LIDiTPipeline
from lidit.serving.admission import accept, stepper_of
from lidit.serving.loop import Counts, Job, OnPass, StepLoop
from lidit.serving.profile import Capacity, Size
from lidit.serving.request import Request

AGAIN_S = 0.001


class Engine:
    """Draws many requests at once with one model on one device.

    A picture is that of the pipeline with the same prompt, seed and settings, whatever is drawn
    beside it.

    Args:
        pipeline: a loaded model, on its device for good: no part of it may be offloaded.
        sizes: (height, width) in pixels whose row caps are measured now rather than at their first
            request.
        padding: what passes are padded to. cap_of: latent size -> rows of a pass, in place of
            measured caps.
        on_pass: told (latent size, rows, seconds) of each pass, in the engine's thread; it must
            return, and not raise.
    """

    def __init__(
        self,
        pipeline: LIDiTPipeline,
        sizes: Sequence[tuple[int, int]] = (),
        padding: Padding | None = None,
        cap_of: Callable[[Size], int] | None = None,
        on_pass: OnPass | None = None,
    ) -> None:
        self.pipeline = pipeline
        _ = pipeline.codec  # loaded here, not by whichever threads come first
        stepper = stepper_of(pipeline, padding)
        measured = Capacity(stepper)
        self._loop = (
            StepLoop(stepper, measured, on_pass, measured.brisk)
            if cap_of is None
            else StepLoop(stepper, cap_of, on_pass)
        )
        for height, width in sizes:
            self._loop.cap_of(pipeline.latent_shape(height, width)[1:])
        self._changed = Condition()
        self._arrived: list[Job] = []
        self._units = 0  # of what the loop holds, as of its last turn
        self._closing = self._draining = False
        self._thread = Thread(target=self._run, name="lidit-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[torch.Tensor]:
        """Take a request; its future gets the latents [n, C, H, W], for `pipeline.codec.decode`.

        `future.cancel()` ends the request at the next step, also while it waits. Previews are
        called in the engine's
        thread: they must hand the tensor on and return; what they raise ends the request.

        Raises InputError for what the model cannot draw, JobError after `close`.
        """
        job = accept(self.pipeline, request)
        with self._changed:
            if self._closing:
                raise JobError("the engine is closed; it takes no more requests")
            self._arrived.append(job)
            self._changed.notify()
        return job.future

    @property
    def units(self) -> int:
        """Compute units, pixels x steps, that wait or are in work: what a new request stands
        behind.
        """
        with self._changed:
            arrived = sum(job.units for job in self._arrived)
            return self._units + arrived

    def row_cap(
        self, height: int | None = None, width: int | None = None, brisk: bool = False
    ) -> int:
        """Rows of a pass at most for images of this size in pixels; a guided image has two rows.
        `brisk`: of a pass that a short request takes part in.
        """
        cap_of = self._loop.brisk_of if brisk else self._loop.cap_of
        return cap_of(self.pipeline.latent_shape(height, width)[1:])

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return replace(self._loop.counts)

    @property
    def alive(self) -> bool:
        """Whether the step loop runs; it does until `close`."""
        return self._thread.is_alive()

    def close(self, drain: bool = False) -> None:
        """Take no more requests and end the thread; `drain` finishes those it has, else they are
        cancelled.
        """
        with self._changed:
            self._closing, self._draining = True, self._draining or drain
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)

    def _asked(self, requests: int) -> bool:
        """Whether so many have come since the last turn, or nobody will."""
        return self._closing or len(self._arrived) >= requests

    def _run(self) -> None:
        busy = True
        while True:
            with self._changed:
                while not (busy or self._arrived or self._closing):
                    self._changed.wait()
                arrived, self._arrived = self._arrived, []
                if self._closing and not (self._draining and (busy or arrived)):
                    break
                self._units += sum(job.units for job in arrived)
            for job in arrived:
                self._loop.add(job)
            before = self._loop.counts.finished
            try:
                busy = self._loop.turn()
            except Exception as error:  # nobody may wait for ever for a thread that is gone
                self._loop.fail_all(error)
            finished = self._loop.counts.finished - before
            with self._changed:
                self._units = self._loop.units
                # Whoever has an answer may ask again at once: without this breath the next pass
                # would leave before the question is here, with an empty place.
                if finished:
                    self._changed.wait_for(partial(self._asked, finished), AGAIN_S)
        for job in arrived:
            self._loop.add(job)
        self._loop.cancel_all()
        with self._changed:
            self._units = self._loop.units
