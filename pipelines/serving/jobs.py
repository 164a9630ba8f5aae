"""Orders while they are drawn and for a while after: what has happened so far, for any number of
followers.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Literal

from pipelines.serving.errors import ApiError, Problem, missing
from pipelines.serving.orders import Order
from pipelines.serving.parts import Picture, Preview
from pipelines.serving.settings import LimitSettings

Status = Literal["queued", "in_progress", "succeeded", "failed", "cancelled"]
ENDED = ("succeeded", "failed", "cancelled")
PLACES_TOLD = 20  # how far ahead of its turn a job is told its place
MOST_KEPT = 10_000


@dataclass(frozen=True)
class Happened:
    """One event of a job. number: from 1, without gaps, so a reader can name the last one it has.

    kind: "queued" (position: jobs before it), "accepted" (tokens: of the prompt), "started", "step"
    (image, step, steps), "preview", "picture" (link: to its file), and at the end one of `ENDED`.
    """

    number: int
    kind: str
    values: dict[str, int] = field(default_factory=dict)
    preview: Preview | None = None
    picture: Picture | None = None
    link: str | None = None
    problem: Problem | None = None
    at: float = field(default_factory=time.time)  # when; told again later, an event is the same


@dataclass(frozen=True)
class JobView:
    """What is told of a job. position: of a queued one, jobs before it; ends: unix time until which
    it is kept.
    """

    id: str
    order: Order
    status: Status
    created: int
    tokens: int
    position: int | None
    ends: int | None
    pictures: tuple[tuple[Picture, str], ...]
    problem: Problem | None


@dataclass(eq=False)
class Job:
    """An order of a key. repeat: the client's own name for it, and the digest of what was asked
    under that name.
    """

    order: Order
    key: str
    request: str
    repeat: tuple[str, str] | None = None
    id: str = field(default_factory=lambda: f"job_{secrets.token_hex(16)}")
    created: float = field(default_factory=time.time)
    status: Status = "queued"
    tokens: int = 0
    taken: dict[int, float] = field(default_factory=dict)  # image -> share of its steps
    steps: int = 0  # of each image
    previewed: bool = False
    events: list[Happened] = field(default_factory=list)
    ended: float | None = None
    task: asyncio.Task[None] | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def problem(self) -> Problem | None:
        return self.events[-1].problem if self.events else None

    @property
    def pictures(self) -> tuple[tuple[Picture, str], ...]:
        return tuple(
            (event.picture, event.link or "") for event in self.events if event.picture is not None
        )

    @property
    def bytes(self) -> int:
        files = sum(len(picture.file.data) for picture, _ in self.pictures)
        return files + sum(
            len(event.preview.data) for event in self.events if event.preview is not None
        )

    def tell(self, event: Happened) -> None:
        """Add an event, numbered here, and wake those who follow."""
        self.events.append(event)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def told(self, kind: str, **values: int) -> None:
        self.tell(Happened(self.next, kind, values))

    @property
    def next(self) -> int:
        """The number of the next event."""
        return len(self.events) + 1

    def end(self, status: Status, problem: Problem | None = None) -> None:
        self.status, self.ended = status, time.time()
        self.tell(Happened(self.next, status, problem=problem))

    async def follow(self, after: int = 0) -> AsyncGenerator[Happened, None]:
        """Every event after number `after`, those of the past at once, until the job has ended."""
        while True:
            changed = self._changed
            while after < len(self.events):
                event = self.events[after]
                after += 1
                yield event
                if event.kind in ENDED:
                    return
            if self.ended is not None:  # a reader that has named the last event
                return
            await changed.wait()


class JobBoard:
    """All jobs of a server, by id. A job is its key's alone: to another key it does not exist."""

    def __init__(self, limits: LimitSettings, clock: Callable[[], float] = time.time) -> None:
        self.limits, self._clock = limits, clock
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Job] = []

    def add(self, job: Job) -> None:
        self._sweep()
        self._jobs[job.id] = job
        self._waiting.append(job)
        job.told("queued", position=len(self._waiting) - 1)

    def start(self, job: Job) -> None:
        """The network has begun: the job leaves the queue, and those behind it move up."""
        if job.status == "queued":
            job.status = "in_progress"
            self._move_up(job)
            job.told("started")

    def end(self, job: Job, status: Status, problem: Problem | None = None) -> None:
        job.end(status, problem)
        self._move_up(job)

    def find(self, key: str, job_id: str) -> Job:
        """Raises ApiError 404 for a job that is not there, or not this key's."""
        self._sweep()
        job = self._jobs.get(job_id)
        if job is None or job.key != key:
            raise missing(f"job {job_id!r}")
        return job

    def repeated(self, key: str, repeat: tuple[str, str]) -> Job | None:
        """The job that this key has asked for under the same name. Raises ApiError 409 where it was
        another one.
        """
        self._sweep()
        for job in self._jobs.values():
            if job.key == key and job.repeat is not None and job.repeat[0] == repeat[0]:
                if job.repeat != repeat:
                    reused = (
                        "this Idempotency-Key was used for another request; give each "
                        "request its own"
                    )
                    raise ApiError.of(409, "idempotency_key_reused", reused)
                return job
        return None

    def forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)

    def view(self, job: Job) -> JobView:
        position = self._waiting.index(job) if job in self._waiting else None
        ends = None if job.ended is None else int(job.ended + self.limits.keep_s)
        return JobView(
            job.id,
            job.order,
            job.status,
            int(job.created),
            job.tokens,
            position,
            ends,
            job.pictures,
            job.problem,
        )

    @property
    def running(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.ended is None]

    def _move_up(self, job: Job) -> None:
        if job not in self._waiting:
            return
        place = self._waiting.index(job)
        del self._waiting[place]
        for position, other in enumerate(self._waiting[place:PLACES_TOLD], start=place):
            other.told("queued", position=position)

    def _sweep(self) -> None:
        """Forget what has been kept long enough, and the oldest where pictures take too much
        memory.
        """
        now = self._clock()
        ended = [job for job in self._jobs.values() if job.ended is not None]
        for job in ended:
            if job.ended is not None and job.ended + self.limits.keep_s <= now:
                self.forget(job)
        left = [job for job in ended if job.id in self._jobs]
        held = sum(job.bytes for job in left)
        for job in left:  # in the order they came
            if held <= self.limits.keep_bytes and len(self._jobs) <= MOST_KEPT:
                break
            held -= job.bytes
            self.forget(job)
