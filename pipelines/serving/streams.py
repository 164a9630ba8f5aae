"""Answers that come bit by bit, and work that ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pipelines.serving.answers import DONE, KEEP_ALIVE, Shapes, failed, sse
from pipelines.serving.errors import ApiError, Problem, broken
from pipelines.serving.jobs import ENDED, Happened
from pipelines.serving.orders import Order
from pipelines.serving.parts import Picture

Result = TypeVar("Result")
Events = AsyncGenerator[Happened, None]
SILENCE_S = 15.0  # proxies close connections that say nothing for a minute
GONE = ApiError(Problem(499, "client_closed", "the client has gone"))


class EventStream(StreamingResponse):
    """Server-sent events, whose source is closed however the answer ends."""

    def __init__(
        self, source: AsyncGenerator[bytes, None], headers: dict[str, str] | None = None
    ) -> None:
        # Proxies in front must pass events on as they come.
        super().__init__(
            source,
            headers={"x-accel-buffering": "no", **(headers or {})},
            media_type="text/event-stream",
        )
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


async def while_there(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; it is cancelled as soon as the client has closed the connection."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GONE
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait({task, gone})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def accepted(events: Events) -> list[Happened]:
    """The events until the words have passed their checks. Raises ApiError where the order ends
    before.
    """
    told = []
    async for event in events:
        told.append(event)
        if event.kind in ENDED and event.kind != "succeeded":
            await events.aclose()
            raise failure(event)
        if event.kind not in ("queued", "started"):
            break
    return told


async def pictures_of(events: Events) -> tuple[int, list[tuple[Picture, str]]]:
    """The prompt's tokens, and all pictures of an order with their links. Raises ApiError unless it
    succeeds.
    """
    tokens, found = 0, []
    async with aclosing(events):
        async for event in events:
            tokens = event.values.get("tokens", tokens)
            if event.picture is not None:
                found.append((event.picture, event.link or ""))
            if event.kind == "succeeded":
                return tokens, found
            if event.kind in ENDED:
                raise failure(event)
    raise broken()


def failure(event: Happened) -> ApiError:
    """Why an order that has ended has no pictures."""
    if event.problem is not None:
        return ApiError(event.problem)
    return ApiError.of(409, "cancelled", "the request was cancelled")


async def generation_stream(
    shapes: Shapes, order: Order, told: list[Happened], events: Events
) -> AsyncGenerator[bytes, None]:
    """A generation as OpenAI streams it, after the events that were `told` already."""
    tokens = 0
    async with aclosing(events), aclosing(_beating(events)) as rest:
        for event in told:
            tokens = event.values.get("tokens", tokens)
        async for following in rest:
            if following is None:
                yield KEEP_ALIVE
                continue
            tokens = following.values.get("tokens", tokens)
            if (values := shapes.event(order, tokens, following)) is not None:
                yield sse(values)
            if following.kind == "succeeded":
                yield DONE
            elif following.kind in ENDED:
                yield sse(failed(failure(following).problem))


async def job_stream(
    shapes: Shapes, order: Order, tokens: int, events: Events
) -> AsyncGenerator[bytes, None]:
    """All of a job's events, numbered, so that a reader can go on after the last one it has."""
    async with aclosing(events), aclosing(_beating(events)) as told:
        async for event in told:
            if event is None:
                yield KEEP_ALIVE
            else:
                tokens = event.values.get("tokens", tokens)
                yield sse(shapes.job_event(order, tokens, event), event.number)


async def _beating(events: Events) -> AsyncGenerator[Happened | None, None]:
    """The events, and None after each silence. What ends the source with an error becomes its last
    event.
    """
    following: asyncio.Task[Happened] | None = None
    number = 0
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({following}, timeout=SILENCE_S)
            if not done:
                yield None
                continue
            try:
                event = following.result()
            except StopAsyncIteration:
                return
            except ApiError as error:
                yield Happened(number + 1, "failed", problem=error.problem)
                return
            following, number = None, event.number
            yield event
    finally:
        if following is not None and not following.done():
            following.cancel()
            await asyncio.wait({following})
