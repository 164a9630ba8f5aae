"""The outermost middleware, in Serve's own HTTP proxies: no client steers Serve, names a request or
asks what runs.

Serve calls `middlewares` in each proxy where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.
"""

from __future__ import annotations

import secrets

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.errors import ApiError, Problem
from pipelines.serving.traces import traceparent

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PLACE = f"{__name__}:middlewares"
REQUEST_ID, TRACE = "x-request-id", "traceparent"
OWN = "/-/"  # Serve's own addresses: the list of applications, and its health
HEALTH = "/-/healthz"
MOST_BYTES = 32 << 20  # of any body; the gateway has narrower limits of its own
# Serve reads these from clients: a deadline that may be switched off, whether to notice that a
# client has gone, and where a request goes. Names are compared with hyphens for underscores, as
# Serve does. A client's trace would join requests that have nothing to do with each other: a
# request's own id is its trace.
STEERING = ("x-request-timeout-seconds", "x-request-disconnect-disabled", "serve-", "x-serve-",
            "x-session-id",
            TRACE, "tracestate", "baggage", REQUEST_ID)  # fmt: skip


class Door:
    """Replaces what a client says to Serve; gives every request an id of ours and every answer its
    headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no web sockets are spoken here
            await send({"type": "websocket.close", "code": 1008})
            return
        request_id = f"req_{secrets.token_hex(16)}"
        headers = [(name, value) for name, value in scope["headers"] if not _steers(name)]
        ours = {REQUEST_ID: request_id, TRACE: traceparent(request_id)}
        headers += [(name.encode(), value.encode()) for name, value in ours.items()]
        scope = {**scope, "headers": headers}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields = MutableHeaders(scope=message)
                fields[REQUEST_ID] = request_id
                fields["x-content-type-options"] = "nosniff"
                fields["referrer-policy"] = "no-referrer"
                fields.setdefault("cache-control", "no-store")
                del fields["server"]
            await send(message)

        if problem := _refused(scope):
            await JSONResponse(problem.body(), problem.status, problem.headers())(
                scope, receive, answer
            )
        else:
            await self.app(scope, receive, answer)


def middlewares() -> list[Middleware]:
    """For Serve's proxies."""
    return [Middleware(Door)]


def _steers(name: bytes) -> bool:
    plain = name.decode("latin-1").lower().replace("_", "-")
    return any(
        plain == word or (word.endswith("-") and plain.startswith(word)) for word in STEERING
    )


def _refused(scope: Scope) -> Problem | None:
    path = scope["path"]
    if path.startswith(OWN) and path != HEALTH:
        return ApiError.of(404, "not_found", "there is nothing at this address").problem
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if not declared.isdigit() or int(declared) > MOST_BYTES:
        return ApiError.of(413, "body_too_large", f"a body has at most {MOST_BYTES} bytes").problem
    return None
