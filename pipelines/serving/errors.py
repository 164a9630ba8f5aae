"""What a client is told when it gets no picture: one exception, in the shape that OpenAI's clients
read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class Problem:
    """One answer that is no picture.

    retry: what `x-should-retry` says. OpenAI's clients repeat 408, 409, 429 and 5xx twice unless it
    is false, and each repetition of a picture that was drawn but not delivered would be drawn
    again.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    retry: bool = False
    retry_after: int | None = None

    @property
    def kind(self) -> str:
        """OpenAI's name for problems of this status."""
        if self.code == "moderation_blocked":
            return "image_generation_user_error"
        known = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return known.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        found = {"x-should-retry": str(self.retry).lower()}
        if self.retry_after is not None:
            found["retry-after"] = str(self.retry_after)
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


@dataclass(frozen=True)
class Found:
    """Which guard refused what. where: "prompt" or "picture"; guard: its name and version."""

    where: str
    guard: str
    score: float


class ApiError(Exception):
    """A `Problem` on its way to the client, through any number of processes.

    found: what a guard found, for the audit log alone.
    """

    def __init__(self, problem: Problem, found: Found | None = None) -> None:
        super().__init__(problem, found)  # all of it, or no other process could read it
        self.problem, self.found = problem, found

    def __str__(self) -> str:
        return f"{self.problem.code}: {self.problem.message}"

    @classmethod
    def of(cls, status: int, code: str, message: str, param: str | None = None) -> Self:
        return cls(Problem(status, code, message, param))


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """What the client has to change."""
    return ApiError.of(400, code, message, param)


def missing(what: str) -> ApiError:
    return ApiError.of(
        404, "not_found", f"{what} does not exist, has expired, or belongs to another key"
    )


def unsafe_to_answer() -> ApiError:
    """A check could not be made. Repeating would draw the picture again, so it is not asked for."""
    return ApiError.of(
        503, "safety_unavailable", "a safety check could not be made, so nothing is delivered"
    )


def blocked(found: Found) -> ApiError:
    """A check was made and says no; what exactly it found is not told."""
    problem = Problem(
        400, "moderation_blocked", f"the {found.where} was refused by the safety checks", "prompt"
    )
    return ApiError(problem, found)


def too_late(seconds: float) -> ApiError:
    return ApiError.of(
        504, "deadline_exceeded", f"no picture within {seconds:g} s: ask for fewer steps or images"
    )


def worker_lost() -> ApiError:
    """Nothing was delivered and another worker may draw it."""
    return ApiError(
        Problem(
            503, "worker_lost", "the process that drew the picture ended; try again", retry=True
        )
    )


def broken(request_id: str | None = None) -> ApiError:
    """A bug, or something that nobody foresaw: the cause is in the log only."""
    named = f"; the request is {request_id}" if request_id else ""
    return ApiError.of(500, "internal_error", f"the server failed{named}")


def queue_full(seconds: int) -> ApiError:
    problem = Problem(
        429, "queue_full", "too much is waiting to be drawn; try again later", retry=True
    )
    return ApiError(replace(problem, retry_after=seconds))


def quota_spent(message: str, seconds: int | None) -> ApiError:
    return ApiError(Problem(429, "insufficient_quota", message, retry_after=seconds))
