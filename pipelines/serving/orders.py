"""What a client may ask for, as OpenAI's images API has it plus our extras, and the order that
becomes of it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lidit.config import SamplerChanges
from lidit.config.fields import LARGEST_SEED, prompt_problem
from lidit.config.settings import validate
from lidit.errors import InputError
from pipelines.serving.errors import ApiError, invalid
from pipelines.serving.settings import LimitSettings

Format = Literal["png", "jpeg", "webp"]
Scheduler = Literal["auto", "ddpm", "ddim", "dpm_solver", "euler"]
Share = Annotated[float, Field(ge=0, le=1)]
# Steps are what a diffusion model's quality is paid with: shares of the model's own.
QUALITY = {"low": 0.5, "high": 2.0, "hd": 2.0}
CHOSEN_SEEDS = 2**31  # seeds that we choose: every JSON reader keeps them whole


class Body(BaseModel):
    """Exact about types, and about fields: what is not known is refused, never ignored."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class DrawBody(Body):
    """Fields that a picture depends on, and how it is delivered."""

    prompt: str = Field(min_length=1, description="what to draw")
    model: str | None = Field(None, description="one of `GET /v1/models`; the only one without it")
    n: int | None = Field(1, ge=1, le=10, description="number of images")
    size: str | None = Field(
        "auto", description='"WIDTHxHEIGHT", or "auto" for the size the model was trained at'
    )
    quality: Literal["auto", "standard", "low", "medium", "high", "hd"] | None = Field(
        "auto",
        description="low: half the model's steps; high and hd: twice as many; ignored where steps "
        "are given",
    )
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        "auto", description="never transparent"
    )
    moderation: Literal["auto", "low"] | None = Field("auto", description="both check alike")
    output_format: Format | None = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="quality of jpeg and webp"
    )
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    partial_images: int | None = Field(
        0, ge=0, le=3, description="previews of each image, with `stream`"
    )
    user: str | None = Field(None, max_length=256, description="taken for compatibility, not kept")
    seed: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="of the first image; the next ones count up"
    )
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    guidance_interval: list[Share] | None = Field(
        None, min_length=2, max_length=2, description="timesteps"
    )
    guidance_rescale: Share | None = None
    negative_prompt: str | None = Field(
        None, description="what guidance leads away from, in place of nothing"
    )
    scheduler: Scheduler | None = None


class GenerationBody(DrawBody):
    """`POST /v1/images/generations`."""

    stream: bool | None = Field(False, description="answer with server-sent events")


class JobBody(DrawBody):
    """`POST /v1/jobs`."""


class ModerationBody(Body):
    """`POST /v1/moderations`."""

    input: str | list[str]
    model: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What requests are checked against before anything is asked of the model.

    multiple: pixels that height and width are multiples of; schedulers: the first is "auto".
    """

    name: str
    digest: str
    created: int
    height: int
    width: int
    multiple: int
    steps: int
    guidance_scale: float
    schedulers: tuple[str, ...]
    encoders: tuple[str, ...]
    guidance_input: bool = False  # a guided step is one pass of the network


@dataclass(frozen=True)
class Delivery:
    """How a picture is delivered."""

    format: Format = "png"
    compression: int | None = None
    url: bool = False


@dataclass(frozen=True)
class Order:
    """Images of one prompt, one per seed, checked against the model's facts and the limits."""

    prompt: str
    negative: str
    seeds: tuple[int, ...]
    height: int
    width: int
    sampler: SamplerChanges
    previews: int
    delivery: Delivery
    units: int  # pixels x steps, twice where guidance acts: what the engine counts

    @property
    def prompt_sha256(self) -> str:
        return hashlib.sha256(self.prompt.encode()).hexdigest()


def order_of(body: DrawBody, facts: ModelFacts, limits: LimitSettings) -> Order:
    """The order behind a request. Raises ApiError, naming the field, for what cannot be drawn."""
    if body.model not in (None, facts.name):
        raise ApiError.of(404, "model_not_found", f"this server draws with {facts.name!r}", "model")
    _check_words(body, limits)
    height, width = _size(body.size or "auto", facts, limits)
    sampler = _sampler(body, facts, limits)
    count = body.n or 1
    if count > limits.images:
        raise invalid(f"{count} images: at most {limits.images} at once", "n")
    scale = facts.guidance_scale if sampler.guidance_scale is None else sampler.guidance_scale
    steps = facts.steps if sampler.steps is None else sampler.steps
    return Order(
        body.prompt,
        body.negative_prompt or "",
        _seeds(body.seed, count),
        height,
        width,
        sampler,
        body.partial_images or 0,
        _delivery(body),
        height * width * steps * count * (1 if scale == 1 or facts.guidance_input else 2),
    )


def _check_words(body: DrawBody, limits: LimitSettings) -> None:
    for field, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt or "")):
        if len(text) > limits.prompt_characters:
            raise invalid(
                f"{len(text)} characters: at most {limits.prompt_characters} are read", field
            )
        if problem := prompt_problem(text):
            raise invalid(problem, field)
    if not body.prompt.strip():
        raise invalid("say what to draw", "prompt")


def _size(text: str, facts: ModelFacts, limits: LimitSettings) -> tuple[int, int]:
    if text == "auto":
        return facts.height, facts.width
    width, cross, height = text.partition("x")
    if not cross or not all(
        side.isascii() and side.isdigit() and len(side) < 6 for side in (width, height)
    ):
        raise invalid(f'a size is "WIDTHxHEIGHT", such as "{facts.width}x{facts.height}"', "size")
    sides = int(height), int(width)
    if min(sides) < 1 or any(side % facts.multiple for side in sides):
        raise invalid(
            f"width and height must be multiples of {facts.multiple} for this model", "size"
        )
    if sides[0] * sides[1] > limits.pixels or max(sides) > limits.aspect * min(sides):
        raise invalid(
            f"at most {limits.pixels} pixels and an aspect of 1:{limits.aspect:g} are drawn", "size"
        )
    return sides


def _sampler(body: DrawBody, facts: ModelFacts, limits: LimitSettings) -> SamplerChanges:
    steps = body.steps
    if steps is None and body.quality in QUALITY:
        steps = min(max(1, round(QUALITY[body.quality] * facts.steps)), limits.steps)
    if steps is not None and steps > limits.steps:
        raise invalid(f"{steps} steps: at most {limits.steps} are taken", "steps")
    if body.scheduler not in (None, "auto", *facts.schedulers):
        raise invalid(
            f"this model is sampled with one of {', '.join(facts.schedulers)}", "scheduler"
        )
    interval = body.guidance_interval
    if interval is not None and interval[0] > interval[1]:
        raise invalid("give the smaller timestep first", "guidance_interval")
    changes: Mapping[str, Any] = {
        "steps": steps,
        "guidance_scale": body.guidance_scale,
        "guidance_interval": tuple(interval) if interval else None,
        "guidance_rescale": body.guidance_rescale,
        "scheduler": body.scheduler,
    }
    try:
        return validate(SamplerChanges, dict(changes), "sampling")
    except InputError as error:
        raise invalid(str(error)) from None


def _seeds(first: int | None, count: int) -> tuple[int, ...]:
    if first is None:  # one for all of them: it is all that is needed to draw them again
        first = secrets.randbelow(CHOSEN_SEEDS)
    if first + count - 1 > LARGEST_SEED:
        raise invalid(f"seeds count up from the first and end at {LARGEST_SEED}", "seed")
    return tuple(range(first, first + count))


def _delivery(body: DrawBody) -> Delivery:
    form = body.output_format or "png"
    if body.background == "transparent":
        raise invalid("this model draws no transparent background", "background")
    if body.output_compression not in (None, 100) and form == "png":
        raise invalid("png is not compressed further; choose jpeg or webp", "output_compression")
    return Delivery(
        form, None if form == "png" else body.output_compression, body.response_format == "url"
    )
