"""The HTTP application: OpenAI's images API, jobs, and the page."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lidit.serving.guards.guard import Verdict
from pipelines.serving.answers import Shapes
from pipelines.serving.document import describe
from pipelines.serving.edge import Edge, refuse
from pipelines.serving.errors import ApiError, Problem, broken, invalid
from pipelines.serving.jobs import Happened, JobView
from pipelines.serving.orders import (
    DrawBody,
    GenerationBody,
    JobBody,
    ModelFacts,
    ModerationBody,
    Order,
    order_of,
)
from pipelines.serving.page import add_page
from pipelines.serving.parts import Picture
from pipelines.serving.settings import ServeSettings
from pipelines.serving.streams import (
    EventStream,
    accepted,
    generation_stream,
    job_stream,
    pictures_of,
    while_there,
)

log = logging.getLogger(__name__)
TITLE = "LI-DiT images"
REPEAT = "idempotency-key"
LONGEST_REPEAT = 255
FACTS_S = 2.0


class LedgerStage(Protocol):
    """The ledger, here or behind a handle."""

    async def check(self, text: str, scope: str) -> str: ...
    async def facts(self) -> ModelFacts: ...
    async def moderate(self, texts: list[str]) -> list[list[Verdict]]: ...
    async def verify(self, data: bytes) -> dict[str, Any]: ...
    async def submit(
        self, key: str, order: Order, request: str, repeat: tuple[str, str] | None = None
    ) -> JobView: ...
    def follow(self, key: str, job_id: str, after: int = 0) -> AsyncGenerator[Happened, None]: ...
    def draw(self, key: str, order: Order, request: str) -> AsyncGenerator[Happened, None]: ...
    async def job(self, key: str, job_id: str) -> JobView: ...
    async def cancel(self, key: str, job_id: str) -> JobView: ...
    async def file(self, job_id: str, image: int, words: dict[str, str]) -> tuple[Picture, str]: ...


class Desk:
    """What every route needs."""

    def __init__(self, ledger: LedgerStage, settings: ServeSettings) -> None:
        self.ledger, self.settings = ledger, settings
        self._facts: ModelFacts | None = None
        self._asked = 0.0

    async def facts(self) -> ModelFacts:
        """The model's, a few seconds old at most: each request needs them twice, and the way to the
        ledger is long.
        """
        if self._facts is None or time.monotonic() > self._asked + FACTS_S:
            self._facts, self._asked = await self.ledger.facts(), time.monotonic()
        return self._facts

    async def shapes(self, request: Request) -> Shapes:
        base = self.settings.public_url or str(request.base_url)
        return Shapes(await self.facts(), base.rstrip("/"))

    async def order(self, body: DrawBody) -> Order:
        return order_of(body, await self.facts(), self.settings.limits)


def build_api(ledger: LedgerStage, settings: ServeSettings) -> Edge:
    """The ASGI application of a gateway. A door must stand before it."""
    app = FastAPI(title=TITLE, docs_url=None, redoc_url=None, redirect_slashes=False)
    desk = Desk(ledger, settings)
    _answer_errors(app)
    _add_images(app, desk)
    _add_jobs(app, desk)
    _add_checks(app, desk)
    add_page(app)
    describe(app)
    return Edge(app, ledger.check, settings.limits)


def _add_images(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/images/generations")
    async def generate(body: GenerationBody, request: Request) -> Response:
        """Draw images of a prompt. With `stream` the answer is server-sent events."""
        if body.partial_images and not body.stream:
            raise invalid("previews come only with stream: true", "partial_images")
        order, shapes = await desk.order(body), await desk.shapes(request)
        key, request_id, repeat = (
            request.state.key,
            request.state.request_id,
            _repeat(request, body),
        )
        if repeat is None and not order.delivery.url:
            events = desk.ledger.draw(key, order, request_id)
        else:  # to be fetched later, or asked for again
            view = await desk.ledger.submit(key, order, request_id, repeat)
            order, events = view.order, desk.ledger.follow(key, view.id)
        if body.stream:
            told = await while_there(request, accepted(events))
            return EventStream(generation_stream(shapes, order, told, events))
        tokens, pictures = await while_there(request, pictures_of(events))
        return JSONResponse(shapes.images(order, tokens, pictures))

    @app.get("/v1/files/{job_id}/{image}", response_class=Response)
    async def file(job_id: str, image: int, request: Request) -> Response:
        """A picture by the link that an answer gave; it needs no other key."""
        picture, form = await desk.ledger.file(job_id, image, dict(request.query_params))
        shown = {"content-disposition": f'inline; filename="{job_id[:12]}-{image}.{form}"'}
        return Response(picture.file.data, media_type=f"image/{form}", headers=shown)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(await desk.ledger.facts(), desk.settings)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        facts = await desk.ledger.facts()
        if name != facts.name:
            raise ApiError.of(
                404, "model_not_found", f"this server draws with {facts.name!r}", "model"
            )
        return _model(facts, desk.settings)


def _add_jobs(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/jobs", status_code=202)
    async def submit(body: JobBody, request: Request) -> Response:
        """Draw images of a prompt, and answer at once with a job to look after."""
        order = await desk.order(body)
        view = await desk.ledger.submit(
            request.state.key, order, request.state.request_id, _repeat(request, body)
        )
        shapes = await desk.shapes(request)
        return JSONResponse(shapes.job(view), 202, {"location": f"/v1/jobs/{view.id}"})

    @app.get("/v1/jobs/{job_id}")
    async def job(job_id: str, request: Request) -> dict[str, Any]:
        return (await desk.shapes(request)).job(await desk.ledger.job(request.state.key, job_id))

    @app.delete("/v1/jobs/{job_id}")
    async def cancel(job_id: str, request: Request) -> dict[str, Any]:
        """End a job at its next step; one that has ended stays as it is."""
        return (await desk.shapes(request)).job(await desk.ledger.cancel(request.state.key, job_id))

    @app.get("/v1/jobs/{job_id}/events", response_class=Response)
    async def events(job_id: str, request: Request, after: int = 0) -> Response:
        """A job's events, those of the past first. `Last-Event-ID`, or `after`, is the last one
        that is known.
        """
        known = request.headers.get("last-event-id", "")
        after = (
            int(known) if known.isascii() and known.isdigit() and len(known) < 10 else max(after, 0)
        )
        key, shapes = request.state.key, await desk.shapes(request)
        view = await desk.ledger.job(key, job_id)
        return EventStream(
            job_stream(shapes, view.order, view.tokens, desk.ledger.follow(key, job_id, after))
        )


def _add_checks(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/moderations")
    async def moderate(body: ModerationBody) -> dict[str, Any]:
        """What the guards of prompts find in texts."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not texts or len(texts) > desk.settings.limits.images:
            raise invalid(f"give 1 to {desk.settings.limits.images} texts", "input")
        results = [_moderation(verdicts) for verdicts in await desk.ledger.moderate(texts)]
        return {
            "id": f"modr-{secrets.token_hex(12)}",
            "model": (await desk.ledger.facts()).name,
            "results": results,
        }

    @app.post("/v1/verify")
    async def verify(request: Request) -> dict[str, Any]:
        """Whether a picture, which is the body, was made here."""
        data = await request.body()
        if not data:
            raise invalid("send the picture's bytes as the body", "body")
        return await desk.ledger.verify(data)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        await desk.ledger.facts()
        return {"status": "ok"}


def _answer_errors(app: FastAPI) -> None:
    """One shape for everything that is no picture, the framework's own refusals among it."""

    @app.exception_handler(ApiError)
    async def ours(request: Request, error: ApiError) -> Response:
        return refuse(error.problem)

    @app.exception_handler(RequestValidationError)
    async def body(request: Request, error: RequestValidationError) -> Response:
        return refuse(_explained(error))

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed"}
        messages = {
            404: "there is nothing at this address",
            405: f"{request.method} is not for this address",
        }
        problem = Problem(error.status_code, codes.get(error.status_code, "invalid_request"),
                          messages.get(error.status_code,
                                       "the request cannot be answered"))  # fmt: skip
        answer = refuse(problem)
        if allowed := (error.headers or {}).get("Allow"):
            answer.headers["allow"] = allowed
        return answer

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return refuse(broken(getattr(request.state, "request_id", None)).problem)


def _explained(error: RequestValidationError) -> Problem:
    """The first mistake, by its field. The values themselves are not repeated."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "extra_forbidden":
        return Problem(400, "unknown_parameter", f"unknown parameter: {place[0]!r}", place[0])
    if first["type"] == "json_invalid":
        return Problem(400, "invalid_json", "the body is no JSON")
    if first["type"] == "missing" and place:
        return Problem(
            400, "missing_required_parameter", f"missing parameter: {place[0]!r}", place[0]
        )
    message = first["msg"] if place else "the body must be a JSON object, sent as application/json"
    return Problem(400, "invalid_value", message, place[0] if place else None)


def _repeat(request: Request, body: DrawBody) -> tuple[str, str] | None:
    """The client's own name for a request, and the digest of what is asked: where, and with which
    fields.
    """
    name = request.headers.get(REPEAT)
    if name is None:
        return None
    if not name.isascii() or not name.isprintable() or not 0 < len(name) <= LONGEST_REPEAT:
        raise invalid(
            f"an Idempotency-Key has 1 to {LONGEST_REPEAT} printable characters", "Idempotency-Key"
        )
    # Streamed or not, the same pictures.
    return name, hashlib.sha256(body.model_dump_json(exclude={"stream"}).encode()).hexdigest()


def _model(facts: ModelFacts, settings: ServeSettings) -> dict[str, Any]:
    """A model as OpenAI lists it, with what can be asked of it."""
    return {
        "id": facts.name,
        "object": "model",
        "created": facts.created,
        "owned_by": "lidit",
        "digest": facts.digest,
        "size": f"{facts.width}x{facts.height}",
        "multiple": facts.multiple,
        "steps": facts.steps,
        "guidance_scale": facts.guidance_scale,
        "schedulers": list(facts.schedulers),
        "limits": {
            "n": settings.limits.images,
            "steps": settings.limits.steps,
            "pixels": settings.limits.pixels,
            "prompt_characters": settings.limits.prompt_characters,
        },
    }


def _moderation(verdicts: list[Verdict]) -> dict[str, Any]:
    return {
        "flagged": any(verdict.flagged for verdict in verdicts),
        "categories": {verdict.guard: verdict.flagged for verdict in verdicts},
        "category_scores": {verdict.guard: verdict.score for verdict in verdicts},
    }
