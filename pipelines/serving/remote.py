"""Stages and the ledger behind Serve's handles, with the same methods as in one process.

What goes wrong in another process arrives as what it was, or as a worker that was lost. Calls go
to the other process directly; only states, and what the network gets of them, go by reference
through Ray's object store, where no process between sees them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve._private.constants import RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from lidit.serving.guards.guard import Verdict
from pipelines.serving.errors import ApiError, broken, worker_lost
from pipelines.serving.finisher import File
from pipelines.serving.jobs import Happened, JobView
from pipelines.serving.orders import Delivery, ModelFacts, Order
from pipelines.serving.parts import Part, Picture

log = logging.getLogger(__name__)
# Every Ray process's environment: bytes of a message between processes, and whether Serve's proxies
# send such messages.
MESSAGE_BYTES, LONGEST_MESSAGE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", 64 << 20
PROXY_DIRECT = "RAY_SERVE_PROXY_USE_GRPC"


@contextmanager
def arriving() -> Iterator[None]:
    """Errors of another process as this one's."""
    try:
        yield
    except ApiError:
        raise
    except RayTaskError as error:
        if isinstance(error.cause, ApiError):
            raise error.cause from None
        log.error("a stage failed: %s", error)
        raise broken() from None
    except (RayError, RayServeException, grpc.RpcError) as error:
        # killed, cancelled from outside, or none is there
        log.warning("a stage was lost: %s", type(error).__name__)
        raise worker_lost() from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # this side gave up
            raise
        log.warning("a stage was cancelled")
        raise worker_lost() from None
    except Exception as error:
        log.error("a stage failed: %s", error)
        raise broken() from None


def directly(handle: DeploymentHandle) -> DeploymentHandle:
    """A handle whose calls are a message there and one back, where messages may be as long as a
    picture; else they are tasks of Ray's, which take twice as long.
    """
    if RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH < LONGEST_MESSAGE:
        return handle
    return handle.options(_by_reference=False)


async def _one(response: Any) -> Any:
    with arriving():
        return await response


async def _many(response: Any) -> AsyncGenerator[Any, None]:
    """A stream's items. Whoever closes it cancels the work at the other end."""
    try:
        with arriving():
            async for item in response:
                yield item
    finally:
        response.cancel()


class RemoteGuards:
    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = directly(handle)

    async def demand(self, texts: list[str]) -> None:
        await _one(self.handle.demand.remote(texts))

    async def moderate(self, texts: list[str]) -> list[list[Verdict]]:
        verdicts: list[list[Verdict]] = await _one(self.handle.moderate.remote(texts))
        return verdicts


class RemoteReader:
    """`encode` gives a reference: the states go from the LLM's process to the network's, and not
    through this one.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def tokens(self, prompts: list[str]) -> int:
        return int(await _one(self.handle.tokens.remote(prompts)))

    def encode(self, prompt: str) -> Any:
        return self.handle.encode.remote(prompt)


class RemoteDenoiser:
    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    def draw(self, order: Order, *states: Any) -> AsyncGenerator[Any, None]:
        return _many(self.handle.options(stream=True).draw.remote(order, *states))


class RemoteDecoder:
    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def decode(self, latents: Any) -> Any:
        return await _one(self.handle.decode.remote(latents))


class RemoteFinisher:
    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def preview(self, pixels: Any, delivery: Delivery) -> bytes:
        return bytes(await _one(self.handle.preview.remote(pixels, delivery)))

    async def finish(self, pixels: Any, delivery: Delivery, title: str) -> File:
        file: File = await _one(self.handle.finish.remote(pixels, delivery, title))
        return file


class RemoteStudio:
    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = directly(handle)

    async def facts(self) -> ModelFacts:
        facts: ModelFacts = await _one(self.handle.facts.remote())
        return facts

    async def moderate(self, texts: Sequence[str]) -> list[list[Verdict]]:
        verdicts: list[list[Verdict]] = await _one(self.handle.moderate.remote(list(texts)))
        return verdicts

    def draw(self, order: Order, request_id: str) -> AsyncGenerator[Part, None]:
        return _many(self.handle.options(stream=True).draw.remote(order, request_id))


class RemoteLedger:
    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = directly(handle)

    async def check(self, text: str, scope: str) -> str:
        return str(await _one(self.handle.check.remote(text, scope)))

    async def facts(self) -> ModelFacts:
        facts: ModelFacts = await _one(self.handle.facts.remote())
        return facts

    async def moderate(self, texts: list[str]) -> list[list[Verdict]]:
        verdicts: list[list[Verdict]] = await _one(self.handle.moderate.remote(texts))
        return verdicts

    async def verify(self, data: bytes) -> dict[str, Any]:
        return dict(await _one(self.handle.verify.remote(data)))

    async def submit(
        self, key: str, order: Order, request: str, repeat: tuple[str, str] | None = None
    ) -> JobView:
        view: JobView = await _one(self.handle.submit.remote(key, order, request, repeat))
        return view

    def follow(self, key: str, job_id: str, after: int = 0) -> AsyncGenerator[Happened, None]:
        return _many(self.handle.options(stream=True).follow.remote(key, job_id, after))

    def draw(self, key: str, order: Order, request: str) -> AsyncGenerator[Happened, None]:
        return _many(self.handle.options(stream=True).draw.remote(key, order, request))

    async def job(self, key: str, job_id: str) -> JobView:
        view: JobView = await _one(self.handle.job.remote(key, job_id))
        return view

    async def cancel(self, key: str, job_id: str) -> JobView:
        view: JobView = await _one(self.handle.cancel.remote(key, job_id))
        return view

    async def file(self, job_id: str, image: int, words: dict[str, str]) -> tuple[Picture, str]:
        found: tuple[Picture, str] = await _one(self.handle.file.remote(job_id, image, words))
        return found
