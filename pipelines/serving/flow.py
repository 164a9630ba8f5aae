"""One order through all stages, from words to files; every stage may be here or in another process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from lidit.serving.guards.guard import Guard, Verdict
from pipelines.serving.checks import demand, judge
from pipelines.serving.errors import ApiError
from pipelines.serving.finisher import File
from pipelines.serving.orders import Delivery, ModelFacts, Order
from pipelines.serving.parts import Accepted, Part, Picture, Preview, Step


class ReaderStage(Protocol):
    """An LLM. What `encode` returns is awaited by nobody here: the network's stage gets it, by reference if need be."""

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

    readers: Mapping[str, ReaderStage]
    denoiser: DenoiserStage
    decoder: DecoderStage
    finisher: FinisherStage


class Flow:
    """Draws orders. `facts`: what they are checked against. `words`: the guard of prompts as they are written."""

    def __init__(self, facts: ModelFacts, stages: Stages, words: Guard[str] | None = None) -> None:
        self.known, self.stages, self.words = facts, stages, words

    async def facts(self) -> ModelFacts:
        return self.known

    async def moderate(self, texts: Sequence[str]) -> list[list[Verdict]]:
        """The verdicts on each text, of all guards that look at words. Raises ApiError where none can."""
        if self.words is None:
            raise ApiError.of(503, "safety_unavailable", "this server was started without a guard of prompts")
        return [[verdict] for verdict in await judge(self.words, texts)]

    async def draw(self, order: Order, request_id: str) -> AsyncGenerator[Part, None]:
        """The order's parts. Closing the generator ends the work at the next step. Raises ApiError."""
        # 1. The words, before anything is computed for them: what is refused here costs no LLM and no network.
        texts = [order.prompt, *([order.negative] if order.negative else [])]
        await demand(self.words, texts, "prompt")
        tokens = await asyncio.gather(*(reader.tokens(texts) for reader in self.stages.readers.values()))
        # 2. All LLMs at once; the network's stage waits for them.
        states = [reader.encode(text) for text in texts for reader in self.stages.readers.values()]
        yield Accepted(tokens[0])
        # 3. Steps, and what is to be seen of them.
        advances = self.stages.denoiser.draw(order, *states)
        async with aclosing(advances) as steps:  # type: ignore[type-var]
            async for advance in steps:
                if advance.latents is None:
                    yield Step(advance.image, advance.number, advance.total)
                    continue
                pixels = await self.stages.decoder.decode(advance.latents)
                if advance.preview is not None:
                    data = await self.stages.finisher.preview(pixels, order.delivery)
                    yield Preview(advance.image, advance.preview, data)
                    continue
                file = await self.stages.finisher.finish(pixels, order.delivery, request_id)
                yield Picture(advance.image, order.seeds[advance.image], file)
