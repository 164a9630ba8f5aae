"""The gateway's own middleware: the key before the body, the body before anybody reads it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.door import REQUEST_ID
from pipelines.serving.errors import ApiError, Problem
from pipelines.serving.settings import LimitSettings

OURS = re.compile(r"req_[0-9a-f]{32}")
API, FILES = "/v1/", "/v1/files/"  # links to files carry their own proof
SCOPES = {"/v1/moderations": "moderate", "/v1/verify": "verify"}
Check = Callable[[str, str], Awaitable[str]]  # (key's text, scope) -> key's id


class Edge:
    """Puts `request_id` and `key` into the request's state. Refuses before a byte of the body is
    read.
    """

    def __init__(self, app: ASGIApp, check: Check, limits: LimitSettings) -> None:
        self.app, self.check, self.limits = app, check, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        try:
            state["request_id"] = _request_id(scope)
            path = scope["path"]
            if path.startswith(API) and not path.startswith(FILES):
                state["key"] = await self._key(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await refuse(error.problem)(scope, receive, send)
            return
        await self.app(scope, _once(body, receive), send)

    async def _key(self, scope: Scope) -> str:
        words = _header(scope, b"authorization").split(" ")
        if len(words) != 2 or words[0].lower() != "bearer":
            raise ApiError.of(
                401, "missing_api_key", "send your key as the header `Authorization: Bearer KEY`"
            )
        return await self.check(words[1], SCOPES.get(scope["path"].rstrip("/"), "generate"))

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises ApiError 413 as soon as it is known to be too large."""
        verified = scope["path"].rstrip("/") == "/v1/verify"
        most = self.limits.verified_bytes if verified else self.limits.body_bytes
        declared = _header(scope, b"content-length")
        size = int(declared) if declared.isascii() and declared.isdigit() else 0
        parts: list[bytes] = []
        more = True
        while more and size <= most:
            message = await receive()
            parts.append(message.get("body", b""))
            size = max(size, sum(map(len, parts)))
            more = message.get("more_body", False)  # a client that has gone sends no more
        if size > most:
            raise ApiError.of(413, "body_too_large", f"a body has at most {most} bytes here")
        return b"".join(parts)


def refuse(problem: Problem) -> JSONResponse:
    return JSONResponse(problem.body(), problem.status, problem.headers())


def _request_id(scope: Scope) -> str:
    """The id that the door has given. Where no door stands, clients could steer Serve: nothing is
    served then.
    """
    request_id = _header(scope, REQUEST_ID.encode())
    if not OURS.fullmatch(request_id):
        raise ApiError.of(503, "not_configured", "the server's proxy was started without its door")
    return request_id


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _once(body: bytes, receive: Receive) -> Receive:
    """What a framework reads: the body, then whatever the client does next."""
    given = False

    async def read() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return read
