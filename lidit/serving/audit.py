"""The audit log: JSON lines, each with the hash of the one before it, on disk before the call returns.

A line never holds a prompt. What may stand in it are the fields of `Entry`, none of which can carry a sentence; a
prompt is its keyed digest, by which two lines can be compared and nothing be looked up without the key.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lidit.config.settings import Settings
from lidit.errors import InputError, one_line

START = "0" * 64  # what the first line follows
LONGEST_LINE = 1 << 16
KEY_BYTES = 32

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Event = Literal[
    "started", "stopped", "key-denied", "quota-exceeded", "accepted", "prompt-refused", "image-refused",
    "issued", "cancelled", "failed", "safety-unavailable",
]  # fmt: skip


class AuditUnavailable(Exception):
    """The log cannot be written or cannot be trusted: serving must stop until an operator has looked."""


class Entry(Settings):
    """What may be said of an event. Every field has a form that no prompt fits into.

    request: our request id. key: the key's id. prompt: `AuditLog.digest` of the prompt. guard: name of the guard and
    its version. score: of that guard. seed, steps, width, height, units: of the request. model: sha256 of the model
    folder's checksums. image: sha256 of the bytes that were delivered. manifest: id of the C2PA manifest.
    """

    event: Event
    request: Word | None = None
    key: Word | None = None
    prompt: Digest | None = None
    guard: Word | None = None
    score: float | None = None
    seed: int | None = None
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    units: int | None = None
    model: Digest | None = None
    image: Digest | None = None
    manifest: Word | None = None


@dataclass(frozen=True)
class Chain:
    """A chain without a fault: how many lines, and the hash of the last one."""

    lines: int
    head: str


class ChainBroken(Exception):
    """The first line (from 1) that is not what was written, and why."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line, self.reason = line, reason


class AuditLog:
    """The one writer of a log; a second one is refused. Threads may share it.

    Opening reads the whole chain: a broken one is never continued. After a failed write every further `append` fails.

    Args:
        path: made where it is missing. key: of the digests of prompts, from `load_key`.
    """

    def __init__(self, path: Path, key: bytes, clock: Callable[[], float] = time.time) -> None:
        raise NotImplementedError

    def digest(self, prompt: str) -> str:
        """The prompt's HMAC-SHA256, for `Entry.prompt`."""
        raise NotImplementedError

    def append(self, entry: Entry) -> str:
        """Write a line and wait for the disk; its hash. Raises AuditUnavailable where that fails, disk full included."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def load_key(path: Path) -> bytes:
    """The key of prompts' digests; made, readable by the owner alone, where the file is missing."""
    raise NotImplementedError


def check_chain(path: Path) -> Chain:
    """Read a log from its first line. Raises ChainBroken at the first bad line, InputError for no readable file."""
    raise NotImplementedError
