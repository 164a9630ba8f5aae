"""What clients read: OpenAI's shapes of pictures and events, and ours of jobs."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.serving.errors import Problem
from pipelines.serving.jobs import Happened, JobView
from pipelines.serving.orders import ModelFacts, Order
from pipelines.serving.parts import Picture

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": still here\n\n"
PREVIEW, COMPLETED = "image_generation.partial_image", "image_generation.completed"


@dataclass(frozen=True)
class Shapes:
    """Answers about pictures of one model. base: the address that links begin with."""

    facts: ModelFacts
    base: str = ""

    def common(self, order: Order) -> dict[str, Any]:
        """What OpenAI says of every picture, and the settings to draw it again."""
        sampler = order.sampler
        return {
            "background": "opaque",
            "output_format": order.delivery.format,
            "quality": "auto",
            "size": f"{order.width}x{order.height}",
            "model": self.facts.name,
            "steps": sampler.steps or self.facts.steps,
            "guidance_scale": self.facts.guidance_scale
            if sampler.guidance_scale is None
            else sampler.guidance_scale,
        }

    def usage(self, order: Order, tokens: int) -> dict[str, Any]:
        """Tokens as far as there are any: of the prompt, and image tokens as OpenAI counts them do
        not exist here.
        """
        details = {"text_tokens": tokens, "image_tokens": 0}
        return {
            "input_tokens": tokens,
            "input_tokens_details": details,
            "output_tokens": 0,
            "total_tokens": tokens,
            "compute_units": order.units,
        }

    def image(self, order: Order, picture: Picture, link: str) -> dict[str, Any]:
        """One entry of `data`."""
        content = (
            {"url": self.base + link}
            if order.delivery.url
            else {"b64_json": text_of(picture.file.data)}
        )
        return {**content, "seed": picture.seed, "sha256": picture.file.sha256}

    def images(
        self, order: Order, tokens: int, pictures: list[tuple[Picture, str]]
    ) -> dict[str, Any]:
        """The answer to a generation."""
        data = [
            self.image(order, picture, link)
            for picture, link in sorted(pictures, key=lambda p: p[0].image)
        ]
        usage = self.usage(order, tokens)
        return {"created": int(time.time()), "data": data, **self.common(order), "usage": usage}

    def event(self, order: Order, tokens: int, event: Happened) -> dict[str, Any] | None:
        """A stream's event in OpenAI's words; None for one that they have no word for."""
        shared = {**self.common(order), "created_at": int(event.at)}
        if event.preview is not None:
            seen = event.preview
            return {
                "type": PREVIEW,
                "b64_json": text_of(seen.data),
                "partial_image_index": seen.number,
                "image_index": seen.image,
                **shared,
            }
        if event.picture is not None:
            picture = event.picture
            image = {
                "b64_json": text_of(picture.file.data),
                **self.image(order, picture, event.link or ""),
            }
            return {
                "type": COMPLETED,
                "image_index": picture.image,
                **image,
                **shared,
                "usage": self.usage(order, tokens),
            }
        return None

    def job(self, view: JobView) -> dict[str, Any]:
        """A job as `GET /v1/jobs/ID` has it."""
        data = None
        if view.status == "succeeded":
            data = [self.image(view.order, picture, link) for picture, link in view.pictures]
        return {
            "id": view.id,
            "object": "image.job",
            "status": view.status,
            "created_at": view.created,
            "expires_at": view.ends,
            "position": view.position,
            **self.common(view.order),
            "seeds": list(view.order.seeds),
            "data": data,
            "error": None if view.problem is None else view.problem.body()["error"],
        }

    def job_event(self, order: Order, tokens: int, event: Happened) -> dict[str, Any]:
        """A job's event: OpenAI's where there is one, else ours, `job.KIND`."""
        known = self.event(order, tokens, event)
        if known is not None:
            return known
        told: dict[str, Any] = {"type": f"job.{event.kind}", **event.values}
        return told if event.problem is None else {**told, **failed(event.problem)}


def failed(problem: Problem) -> dict[str, Any]:
    """A stream's last event where there is no picture. Its `error` is what makes OpenAI's clients
    raise.
    """
    return problem.body()


def sse(values: Mapping[str, Any], number: int | None = None) -> bytes:
    """A server-sent event named by its type."""
    name = values.get("type", "error")
    begin = "" if number is None else f"id: {number}\n"
    return f"{begin}event: {name}\ndata: {json.dumps(values, separators=(',', ':'))}\n\n".encode()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
