"""The stages that draw an order, each with what it needs in memory: an LLM, the network, the codec,
the marks.

They know nothing of Serve: in one process they are called, on a cluster they are deployments.

Shapes: T caption tokens, W width of an LLM, C latent channels, H x W latent size.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lidit.codecs import Codec
from lidit.errors import InputError
from lidit.pipeline import LIDiTPipeline
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.pixels import unit_to_bytes
from lidit.serving import Engine, PromptCache, Request
from lidit.serving.guards.guard import Guard
from lidit.serving.guards.probe import States
from lidit.text.tokenizer import CaptionTokens
from pipelines.runtime.prometheus import EngineMetrics
from pipelines.serving.checks import demand
from pipelines.serving.errors import ApiError, invalid, worker_lost
from pipelines.serving.orders import Order

STEPS_TOLD = 32  # at most so many steps of an image are told while it is drawn
TELL_S = 0.1  # and no two within this time: each takes a message between processes
Pixels = NDArray[np.uint8]  # [height, width, 3]


class Reader:
    """One LLM. A prompt is read once and kept by its words."""

    def __init__(self, encoder: ModelEncoder, device: str | None = None) -> None:
        self.encoder, self.device = encoder, device
        self.cache = PromptCache()
        self._metrics = EngineMetrics(encoder.name)
        encoder.encoder(device)  # loaded now, not by the first prompt

    async def tokens(self, prompts: list[str]) -> int:
        """How many tokens the prompts have. Raises ApiError for one that the LLM would cut: the end
        was not drawn.
        """
        rows = await asyncio.to_thread(self._tokenized, prompts)
        if any(row.truncated for row in rows):
            raise invalid(
                f"the prompt is longer than the {self.encoder.spec['max_tokens']} tokens that "
                "are read",
                "prompt",
            )
        return sum(len(row.token_ids) for row in rows)

    def _tokenized(self, prompts: list[str]) -> list[CaptionTokens]:
        with self.cache.reading:
            return self.encoder.encoder(self.device).tokenizer.tokenize(prompts)

    async def encode(self, prompt: str) -> torch.Tensor:
        """States [T, W]."""
        return (await self.encode_all([prompt]))[0]

    async def encode_all(self, prompts: list[str]) -> list[torch.Tensor]:
        """States of each prompt; those that are not kept go to the LLM at once."""
        found = await asyncio.to_thread(self.cache.states, self.encoder, prompts, self.device)
        self._metrics.prompt_states(self.cache.hits, self.cache.misses)
        return found


@dataclass(frozen=True)
class Advance:
    """An image after one of its steps: latents [C, H, W] for a preview that is due,
    or at its end.
    """

    image: int
    number: int
    total: int
    latents: torch.Tensor | None = None
    preview: int | None = None


class Denoiser:
    """The network and its step loop. What leaves it is on the CPU: it may go to another process."""

    def __init__(
        self,
        name: str,
        pipeline: LIDiTPipeline,
        sizes: tuple[tuple[int, int], ...] = (),
        probe: Guard[States] | None = None,
    ) -> None:
        self.pipeline, self.probe = pipeline, probe
        self._metrics = EngineMetrics(name)
        self.engine = Engine(pipeline, sizes, on_pass=self._passed)

    async def draw(
        self, order: Order, *states: torch.Tensor | Awaitable[torch.Tensor]
    ) -> AsyncIterator[Advance]:
        """Steps as they are taken, then every image's latents. `states`: of the model's encoders,
        in their order, and once more of the negative prompt where there is one; not awaited yet
        where the LLMs are in this process.

        Whoever closes the iterator ends the work at the next step. Raises ApiError where the probe
        refuses the states.
        """
        found = await asyncio.gather(*(_state(entry) for entry in states))
        names = list(self.pipeline.encoders)
        prompts = [
            dict(zip(names, found[at : at + len(names)], strict=True))
            for at in range(0, len(found), len(names))
        ]
        if self.probe is not None:
            await demand(self.probe, prompts, "prompt")
        total = order.sampler.applied(self.pipeline.sampler).steps
        shown = shown_after(total, order.previews)
        events: asyncio.Queue[Advance | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        last: dict[int, float] = {}  # image -> when its last step was told

        def told(image: int, number: int, latents: torch.Tensor) -> None:
            preview, now = shown.get(number), time.monotonic()
            if preview is None and now < last.get(image, 0.0) + TELL_S:
                return
            last[image] = now
            advance = Advance(
                image, number, total, None if preview is None else latents.cpu(), preview
            )
            loop.call_soon_threadsafe(events.put_nowait, advance)

        def ended(future: Future[torch.Tensor]) -> None:
            loop.call_soon_threadsafe(events.put_nowait, None)

        told_steps = min(total - 1, STEPS_TOLD) if order.previews == 0 else total - 1
        size, negative = (order.height, order.width), prompts[1] if order.negative else None
        request = Request(prompts[0], order.seeds, order.sampler, *size, told_steps, told, negative)
        try:
            future = self.engine.submit(request)
        except InputError as error:
            raise invalid(str(error)) from None
        future.add_done_callback(ended)
        try:
            while (event := await events.get()) is not None:
                yield event
            if future.cancelled():  # the engine was closed under it
                raise worker_lost()
            for image, latents in enumerate(future.result().cpu()):
                if not torch.isfinite(latents).all():
                    raise ApiError.of(
                        500,
                        "not_finite",
                        "the model gave no picture for this prompt and these settings",
                    )
                yield Advance(image, total, total, latents)
        finally:
            future.cancel()

    def _passed(self, size: tuple[int, int], rows: int, seconds: float) -> None:
        height, width = (side * self.pipeline.codec.factor for side in size)
        self._metrics.passed(f"{width}x{height}", rows, seconds)


class Decoder:
    """The codec."""

    def __init__(self, codec: Codec, device: torch.device | str = "cpu") -> None:
        self.codec, self.device = codec, device

    async def decode(self, latents: torch.Tensor) -> Pixels:
        """The picture of latents [C, H, W]."""
        return await asyncio.to_thread(self._decode, latents)

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> Pixels:
        images = self.codec.decode(latents[None].to(self.device)).float().clamp(0, 1).cpu()
        return unit_to_bytes(images[0].permute(1, 2, 0)).contiguous().numpy()


async def _state(entry: torch.Tensor | Awaitable[torch.Tensor]) -> torch.Tensor:
    return entry if isinstance(entry, torch.Tensor) else await entry


def shown_after(steps: int, previews: int) -> dict[int, int]:
    """Step -> number of the preview that is due after it: the first one an eighth of the way, so
    that there is something to see within a quarter of the time, the others at equal distances.
    """
    at = sorted(
        {-(-steps * (previews + 7 * number) // (8 * previews)) for number in range(previews)}
    )
    return {step: number for number, step in enumerate(step for step in at if step < steps)}
