"""The one place that knows keys, quotas, the queue, jobs and the audit log: nothing is drawn that
it did not let in, and nothing is delivered that it did not write down.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lidit.serving.audit import AuditLog, AuditUnavailable, Entry, Event, load_key
from lidit.serving.guards.guard import Verdict
from lidit.serving.keys import KeyDenied, KeyStore, KeysUnavailable, QuotaExceeded
from lidit.serving.shared_keys import Keys
from pipelines.runtime.prometheus import RequestMetrics
from pipelines.serving.admission import Admission
from pipelines.serving.errors import ApiError, broken, missing, quota_spent, too_late
from pipelines.serving.issued import Register
from pipelines.serving.jobs import Happened, Job, JobBoard, JobView, Status
from pipelines.serving.links import Links
from pipelines.serving.orders import ModelFacts, Order
from pipelines.serving.parts import Accepted, Part, Picture, Preview, Step
from pipelines.serving.settings import LimitSettings

log = logging.getLogger(__name__)
FACTS_S = 5.0
# What no answer of `draw` tells: on its way to a gateway each event takes a message of its own.
UNTOLD = ("queued", "started", "step")
KEYS, AUDIT, AUDIT_KEY = "keys.sqlite", "audit.jsonl", "audit.key"


@dataclass(frozen=True)
class Outcome:
    """How a job ended, and what the audit log calls it where no picture did."""

    status: Status
    event: Event | None = None
    error: ApiError | None = None


class Studio(Protocol):
    """Whoever draws: a `Flow` in this process or behind a handle."""

    async def facts(self) -> ModelFacts: ...

    async def moderate(self, texts: Sequence[str]) -> list[list[Verdict]]: ...

    def draw(self, order: Order, request_id: str) -> AsyncGenerator[Part, None]: ...


class Ledger:
    """folder: of the files that survive a restart. keys: kept elsewhere. Everything a client gets
    passes here once.
    """

    def __init__(
        self,
        folder: Path,
        studio: Studio,
        limits: LimitSettings,
        register: Register,
        keys: Keys | None = None,
    ) -> None:
        self.studio, self.limits, self.register = studio, limits, register
        folder.mkdir(parents=True, exist_ok=True)
        self.keys: Keys = keys or KeyStore(folder / KEYS, create=True)
        self.audit = AuditLog(folder / AUDIT, load_key(folder / AUDIT_KEY))
        self.admission, self.board, self.links = (
            Admission(limits),
            JobBoard(limits),
            Links(limits.keep_s),
        )
        self._facts: ModelFacts | None = None
        self._asked = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._metrics = RequestMetrics("")
        self.audit.append(Entry(event="started"))

    # ---------------------------------------------------------------------------------------------
    # Who asks, and for what

    async def check(self, text: str, scope: str) -> str:
        """The id of the key with this text. Raises ApiError 401, 403 or 503."""
        try:
            key = await asyncio.to_thread(self.keys.check, text, scope)
        except KeyDenied as denied:
            if denied.key_id is not None:  # guesses are not written down: they would fill the disk
                await self._write("key-denied", key=denied.key_id)
            if denied.reason == "scope":
                raise ApiError.of(
                    403, "insufficient_scope", f"this key may not be used for {scope!r}"
                ) from None
            raise ApiError.of(
                401, "invalid_api_key", "this API key is not known, or is no longer valid"
            ) from None
        except KeysUnavailable:
            raise ApiError.of(
                503, "keys_unavailable", "keys cannot be checked at the moment"
            ) from None
        return key.id

    async def facts(self) -> ModelFacts:
        """What the studios tell of their model; asked anew every few seconds: an update replaces
        them one by one.
        """
        if self._facts is None:
            self._facts = await self._ask()
        elif time.monotonic() > self._asked + FACTS_S:
            self._asked = time.monotonic()
            # Nobody waits for it, least of all while there is no studio; a context of its own, as
            # jobs have.
            self._asking = asyncio.get_running_loop().create_task(
                self._ask_again(), context=contextvars.Context()
            )
        return self._facts

    async def _ask(self) -> ModelFacts:
        facts = await self.studio.facts()
        self._asked, self._metrics = time.monotonic(), RequestMetrics(facts.name)
        return facts

    async def _ask_again(self) -> None:
        # a studio that is lost: what it told is true until another one tells
        with contextlib.suppress(ApiError):
            self._facts = await self._ask()

    async def moderate(self, texts: list[str]) -> list[list[Verdict]]:
        return await self.studio.moderate(texts)

    async def verify(self, data: bytes) -> dict[str, Any]:
        """What can be said of a picture's origin."""
        return await asyncio.to_thread(self.register.verify, data)

    # ---------------------------------------------------------------------------------------------
    # Jobs

    async def submit(
        self, key: str, order: Order, request: str, repeat: tuple[str, str] | None = None
    ) -> JobView:
        """Let an order in, or find the one the key asked for under the same name. Raises ApiError
        409, 429, 503.
        """
        if repeat is not None and (known := self.board.repeated(key, repeat)) is not None:
            return self.board.view(known)
        job = Job(order, key, request, repeat)
        self.admission.join(key, order.units)
        self._metrics.queue(self.admission.units)
        # at once: the same request may come again while this one is written down
        self.board.add(job)
        charged = False
        try:
            await self._charge(job)
            charged = True
            await self._write("accepted", job)
        except BaseException as error:
            self.admission.leave(key, order.units, drawn=False)
            self.board.end(
                job,
                "failed",
                error.problem if isinstance(error, ApiError) else broken(request).problem,
            )
            self.board.forget(job)
            if charged:
                await asyncio.shield(self._refund(job, whole=True))
            raise
        # A context of its own: the job outlives the request that brought it.
        job.task = asyncio.get_running_loop().create_task(
            self._run(job), context=contextvars.Context()
        )
        try:
            await asyncio.sleep(0)  # from here on a cancellation reaches it where it can say so
        except asyncio.CancelledError:
            self._stop(job)
            raise
        return self.board.view(job)

    async def follow(self, key: str, job_id: str, after: int = 0) -> AsyncGenerator[Happened, None]:
        """A job's events after number `after`, as they come."""
        async with aclosing(self.board.find(key, job_id).follow(after)) as events:
            async for event in events:
                yield event

    async def draw(self, key: str, order: Order, request: str) -> AsyncGenerator[Happened, None]:
        """An order and its events in one call, less its place and its steps: whoever stops
        listening ends the work, and nothing is kept.
        """
        view = await self.submit(key, order, request)
        job = self.board.find(key, view.id)
        try:
            async with aclosing(job.follow()) as events:
                async for event in events:
                    if event.kind not in UNTOLD:
                        yield event
        finally:
            self._stop(job)
            self.board.forget(job)

    async def job(self, key: str, job_id: str) -> JobView:
        return self.board.view(self.board.find(key, job_id))

    async def cancel(self, key: str, job_id: str) -> JobView:
        """End a job; one that has ended stays as it is."""
        job = self.board.find(key, job_id)
        self._stop(job)
        if job.task is not None:
            await asyncio.wait([job.task])
        return self.board.view(job)

    async def file(self, job_id: str, image: int, words: dict[str, str]) -> tuple[Picture, str]:
        """The picture behind a link, and its format. Raises ApiError 404 for a link that was not
        given or is over.
        """
        key = self.links.key_of(job_id, image, words)
        job = self.board.find(key, job_id)
        if not await asyncio.to_thread(self._valid, key):
            raise missing("this picture")
        for picture, _ in job.pictures:
            if picture.image == image:
                return picture, job.order.delivery.format
        raise missing("this picture")

    async def close(self) -> None:
        """End what runs, and the log."""
        running = self.board.running
        for job in running:
            self._stop(job)
        await asyncio.gather(*(job.task for job in running if job.task), return_exceptions=True)
        with contextlib.suppress(AuditUnavailable):  # then its end is not what is wrong
            self.audit.append(Entry(event="stopped"))
        self.audit.close()

    # ---------------------------------------------------------------------------------------------

    def _valid(self, key_id: str) -> bool:
        """Whether a key is there and not revoked: links end with it."""
        return any(key.id == key_id and key.revoked is None for key in self.keys.list())

    def _stop(self, job: Job) -> None:
        if job.ended is None and job.task is not None:
            job.task.cancel()

    async def _charge(self, job: Job) -> None:
        try:
            await asyncio.to_thread(self.keys.charge, job.key, job.order.units)
        except QuotaExceeded as spent:
            await self._write("quota-exceeded", job)
            raise quota_spent(
                f"this key has {spent.left} compute units left", int(spent.retry_after) + 1
            ) from None
        except KeyDenied:
            raise ApiError.of(401, "invalid_api_key", "this API key is no longer valid") from None
        except KeysUnavailable:
            raise ApiError.of(
                503, "keys_unavailable", "quotas cannot be checked at the moment"
            ) from None

    async def _run(self, job: Job) -> None:
        """Draw a job to whatever end. Its last event is told when all has been written down."""
        outcome = await self._outcome(job)
        self.admission.leave(job.key, job.order.units, drawn=outcome.status == "succeeded")
        # Whoever cancels once more does not hinder it.
        await asyncio.shield(self._settle(job, outcome))

    async def _outcome(self, job: Job) -> Outcome:
        try:
            async with asyncio.timeout(self.limits.deadline_s):
                await self._draw(job)
        except asyncio.CancelledError:
            return Outcome("cancelled", "cancelled")
        except TimeoutError:
            return Outcome("failed", "failed", too_late(self.limits.deadline_s))
        except ApiError as error:
            return Outcome("failed", _event(error), error)
        except Exception:
            log.exception("request %s failed", job.request)
            return Outcome("failed", "failed", broken(job.request))
        return Outcome("succeeded")

    async def _settle(self, job: Job, outcome: Outcome) -> None:
        """Give back what was not drawn, write down how it ended, and tell."""
        status, error = outcome.status, outcome.error
        try:
            if outcome.event is not None:
                await self._refund(job, whole=error is not None and error.problem.status >= 500)
                found = error.found if error else None
                more = {"guard": found.guard, "score": found.score} if found else {}
                await self._write(outcome.event, job, **more)
        except ApiError as unwritten:
            status, error = "failed", unwritten
        except Exception:
            log.exception("request %s cannot be settled", job.request)
            status, error = "failed", broken(job.request)
        outcome_word = outcome.event or "drawn"
        lost = sum(job.taken.values()) * job.steps if outcome_word != "drawn" else 0
        size = f"{job.order.width}x{job.order.height}"
        self._metrics.ended(outcome_word, size, time.time() - job.created, round(lost))
        self._metrics.queue(self.admission.units)
        self.board.end(job, status, error.problem if error else None)

    async def _draw(self, job: Job) -> None:
        async with aclosing(self.studio.draw(job.order, job.request)) as parts:
            async for part in parts:
                if isinstance(part, Accepted):
                    job.tokens = part.tokens
                    job.told("accepted", tokens=part.tokens)
                    continue
                self.board.start(job)
                if isinstance(part, Step):
                    job.taken[part.image], job.steps = part.number / part.total, part.total
                    job.told("step", image=part.image, step=part.number, steps=part.total)
                elif isinstance(part, Preview):
                    if not job.previewed:
                        self._metrics.previewed(time.time() - job.created)
                        job.previewed = True
                    job.tell(Happened(job.next, "preview", preview=part))
                elif isinstance(part, Picture):
                    await self._issue(job, part)

    async def _issue(self, job: Job, picture: Picture) -> None:
        """Write a picture down, then tell of it."""
        file = picture.file
        try:
            await asyncio.to_thread(self.register.add, file, job.request)
        except Exception:
            # of the register, whatever it is: the picture could not be recognised later
            log.exception("request %s: the picture cannot be registered", job.request)
            unmarked = "the picture could not be registered, so it is not delivered"
            raise ApiError.of(503, "provenance_unavailable", unmarked) from None
        more = {
            "seed": picture.seed,
            "image": file.sha256,
            "manifest": file.manifest,
            "model": file.model,
        }
        await self._write("issued", job, **more)
        job.tell(
            Happened(
                job.next,
                "picture",
                picture=picture,
                link=self.links.make(job.key, job.id, picture.image),
            )
        )

    async def _refund(self, job: Job, whole: bool) -> None:
        """Give back what was not drawn; `whole`: all of it, for the failure is ours."""
        share = 1.0 if whole else 1 - sum(job.taken.values()) / len(job.order.seeds)
        try:
            await asyncio.to_thread(
                self.keys.refund, job.key, int(job.order.units * share), job.created
            )
        except KeysUnavailable:
            raise ApiError.of(
                503, "keys_unavailable", "quotas cannot be written at the moment"
            ) from None

    async def _write(self, event: Event, job: Job | None = None, **facts: Any) -> None:
        """A line of the audit log, on the disk. Raises ApiError 503 where it cannot be written."""
        if job is not None:
            order = job.order
            facts |= {
                "request": job.request, "key": job.key, "prompt": self.audit.digest(order.prompt),
                "width": order.width, "height": order.height, "units": order.units,
                "steps": order.sampler.steps,
            }  # fmt: skip
        try:
            await asyncio.to_thread(self.audit.append, Entry(event=event, **facts))
        except AuditUnavailable:
            log.exception("the audit log cannot be written: nothing is served")
            raise ApiError.of(
                503, "audit_unavailable", "requests cannot be recorded, so none are served"
            ) from None


def _event(error: ApiError) -> Event:
    """The audit log's name for what a client is told."""
    if error.problem.code == "moderation_blocked":
        return (
            "image-refused" if error.found and error.found.where == "picture" else "prompt-refused"
        )
    return "safety-unavailable" if error.problem.code == "safety_unavailable" else "failed"
