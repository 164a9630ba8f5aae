"""One order through all stages, from words to files; every stage may be here or in
another process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from lidit.serving.guards.guard import Verdict
from pipelines.serving.finisher import File
from pipelines.serving.orders import Delivery, ModelFacts, Order
from pipelines.serving.parts import Accepted, Part, Picture, Preview, Step
from pipelines.serving.traces import stage


class PromptStage(Protocol):
    """What looks at prompts as they are written."""

    def demand(self, texts: list[str]) -> Awaitable[None]: ...

    def moderate(self, texts: list[str]) -> Awaitable[list[list[Verdict]]]: ...


class ReaderStage(Protocol):
    """An LLM. What `encode` returns is awaited by nobody here: the network's stage gets it, by
    reference if need be.
    """

    def tokens(self, prompts: list[str]) -> Awaitable[int]: ...

    def encode(self, prompt: str) -> Awaitable[Any]: ...


class DenoiserStage(Protocol):
    """The network; its advances have `image`, `number`, `total`, `latents` and `preview`."""

    def draw(self, order: Order, *states: Any) -> AsyncIterator[Any]: ...


class DecoderStage(Protocol):
    def decode(self, latents: Any) -> Awaitable[Any]: ...


class FinisherStage(Protocol):
    def preview(self, pixels: Any, delivery: Delivery) -> Awaitable[bytes]: ...

    def finish(self, pixels: Any, delivery: Delivery, title: str) -> Awaitable[File]: ...


@dataclass(frozen=True)
class Stages:
    """readers: by the encoders' names, in the model's order."""

    guards: PromptStage
    readers: Mapping[str, ReaderStage]
    denoiser: DenoiserStage
    decoder: DecoderStage
    finisher: FinisherStage


class Flow:
    """Draws orders. `facts`: what they are checked against."""

    def __init__(self, facts: ModelFacts, stages: Stages) -> None:
        self.known, self.stages = facts, stages

    async def facts(self) -> ModelFacts:
        return self.known

    async def moderate(self, texts: Sequence[str]) -> list[list[Verdict]]:
        """The verdicts on each text, of all guards that look at words. Raises ApiError where none
        can.
        """
        return await self.stages.guards.moderate(list(texts))

    async def draw(self, order: Order, request_id: str) -> AsyncGenerator[Part, None]:
        """The order's parts. Closing the generator ends the work at the next step.
        Raises ApiError.
        """
        stages, texts = self.stages, [order.prompt, *([order.negative] if order.negative else [])]
        # 1. The words, before anything is computed for them: what is refused here costs no LLM and
        #    no network.
        with stage(request_id, "guard prompts"):
            await stages.guards.demand(texts)
        with stage(request_id, "count tokens"):
            tokens = await asyncio.gather(
                *(reader.tokens(texts) for reader in stages.readers.values())
            )
        # 2. All LLMs at once; the network's stage waits for them.
        states = [reader.encode(text) for text in texts for reader in stages.readers.values()]
        yield Accepted(tokens[0])
        # 3. Steps, and what is to be seen of them.
        with stage(request_id, "draw", images=len(order.seeds), units=order.units):
            async with aclosing(stages.denoiser.draw(order, *states)) as advances:  # type: ignore[type-var]
                async for advance in advances:
                    if advance.latents is None:
                        yield Step(advance.image, advance.number, advance.total)
                    else:
                        yield await self._shown(advance, order, request_id)

    async def _shown(self, advance: Any, order: Order, request_id: str) -> Part:
        """The preview or picture of latents that have come out of the network."""
        with stage(request_id, "decode", image=advance.image):
            pixels = await self.stages.decoder.decode(advance.latents)
        with stage(request_id, "finish", image=advance.image):
            if advance.preview is not None:
                data = await self.stages.finisher.preview(pixels, order.delivery)
                return Preview(advance.image, advance.preview, data)
            file = await self.stages.finisher.finish(pixels, order.delivery, request_id)
            return Picture(advance.image, order.seeds[advance.image], file)
