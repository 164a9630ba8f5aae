"""The audit log: JSON lines, each with the hash of the one before it, on disk before the call
returns.

A line never holds a prompt. What may stand in it are the fields of `Entry`, none of which can carry
a sentence; a prompt is its keyed digest, by which two lines can be compared and nothing be looked
up without the key.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field

from lidit.config.settings import Settings
from lidit.errors import InputError

START = "0" * 64  # what the first line follows
LONGEST_LINE = 1 << 16
KEY_BYTES = 32

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Event = Literal[
    "started", "stopped", "key-denied", "quota-exceeded", "accepted", "prompt-refused",
    "image-refused",
    "issued", "cancelled", "failed", "safety-unavailable",
]  # fmt: skip


class AuditUnavailable(Exception):
    """The log cannot be written or cannot be trusted: serving must stop until an operator has
    looked.
    """


class Entry(Settings):
    """What may be said of an event. Every field has a form that no prompt fits into.

    request: our request id. key: the key's id. prompt: `AuditLog.digest` of the prompt. guard: name
    of the guard and its version. score: of that guard. seed, steps, width, height, units: of the
    request. model: sha256 of the model folder's checksums. image: sha256 of the bytes that were
    delivered. manifest: id of the C2PA manifest.
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

    Opening reads the whole chain: a broken one is never continued. After a failed write every
    further `append` fails.

    Args:
        path: made where it is missing. key: of the digests of prompts, from `load_key`.
    """

    def __init__(self, path: Path, key: bytes, clock: Callable[[], float] = time.time) -> None:
        if len(key) < KEY_BYTES:
            raise InputError(f"the audit key has {len(key)} bytes; {KEY_BYTES} are needed")
        self.path, self._key, self._clock = path, key, clock
        self._lock = threading.Lock()
        self._failure = ""
        self._file = _open_alone(path)
        try:
            chain = check_chain(path)
        except (ChainBroken, InputError) as error:
            os.close(self._file)
            raise AuditUnavailable(
                f"{path}: {error}; a broken log is not continued: keep the file as evidence and "
                "start another"
            ) from None
        self._lines, self._head = chain.lines, chain.head
        self._size = os.fstat(self._file).st_size

    def digest(self, prompt: str) -> str:
        """The prompt's HMAC-SHA256, for `Entry.prompt`."""
        return hmac.new(
            self._key, prompt.encode("utf-8", "surrogatepass"), hashlib.sha256
        ).hexdigest()

    def append(self, entry: Entry) -> str:
        """Write a line and wait for the disk; its hash. Raises AuditUnavailable where that fails,
        disk full included.

        Entries that were made without validation are validated here, so that no text slips in.
        """
        facts = Entry.model_validate(entry.model_dump()).model_dump(mode="json", exclude_none=True)
        with self._lock:
            if self._failure:
                raise AuditUnavailable(self._failure)
            line, digest = _line(self._lines + 1, self._clock(), facts, self._head)
            try:
                self._require_own_file()
                _write(self._file, line)
                os.fsync(self._file)
            except OSError as error:
                self._give_up(error)
            self._lines, self._head, self._size = self._lines + 1, digest, self._size + len(line)
        return digest

    def close(self) -> None:
        """Give the file free for another writer."""
        with self._lock:
            if not self._failure:
                self._failure = f"{self.path}: the log is closed"
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _require_own_file(self) -> None:
        """A log that was moved, replaced or written to by others is no longer the one that is
        continued.
        """
        own = os.fstat(self._file)
        there = self.path.stat()
        if (own.st_dev, own.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(errno.ESTALE, "another file has taken its place")
        if own.st_size != self._size:
            raise OSError(errno.ESTALE, "somebody else has changed it")

    def _give_up(self, error: OSError) -> NoReturn:
        """Take half a line back, so that the log can be continued once there is room, and write no
        more.
        """
        self._failure = (
            f"{self.path}: the log cannot be written ({error.strerror or type(error).__name__})"
        )
        with contextlib.suppress(OSError):
            if error.errno != errno.ESTALE:
                os.ftruncate(self._file, self._size)
                os.fsync(self._file)
        raise AuditUnavailable(self._failure) from None


def load_key(path: Path) -> bytes:
    """The key of prompts' digests; made, readable by the owner alone, where the file is missing."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise InputError(
                f"{path}: an audit key has {KEY_BYTES} bytes, this file {len(key)}; give the "
                "right file"
            ) from None
        return key
    try:
        key = secrets.token_bytes(KEY_BYTES)
        _write(file, key)
        os.fsync(file)
    finally:
        os.close(file)
    return key


def check_chain(path: Path, known: str | None = None) -> Chain:
    """Read a log from its first line. Raises ChainBroken at the first bad line, InputError for no
    readable file.

    known: the hash of a line that was noted elsewhere; a log that does not hold it was cut off or
    written anew.
    """
    lines, head, seen = 0, START, known in (None, START)
    try:
        with path.open("rb") as file:
            for raw in iter(lambda: file.readline(LONGEST_LINE), b""):
                lines += 1
                head = _checked(raw, lines, head)
                seen = seen or head == known
    except OSError as error:
        raise InputError(
            f"{path}: the log cannot be read ({error.strerror}); give the path of an audit log"
        ) from None
    if not seen:
        raise ChainBroken(
            lines + 1, f"no line has the hash {known}: the log was cut off or written anew"
        )
    return Chain(lines, head)


def _checked(raw: bytes, number: int, before: str) -> str:
    """The hash of a line. Raises ChainBroken unless its bytes are those that `_line` writes."""
    if not raw.endswith(b"\n"):
        raise ChainBroken(number, "it is cut off")
    try:
        found = json.loads(raw)
        line, digest = _line(number, found["time"], found["entry"], before)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ChainBroken(number, "it is no line of an audit log") from None
    if found.get("before") != before or found.get("number") != number:
        raise ChainBroken(number, "it does not follow the line before it")
    if line != raw:
        raise ChainBroken(number, "it was changed")
    return digest


def _line(number: int, now: float, facts: dict[str, Any], before: str) -> tuple[bytes, str]:
    """A line with its hash, which covers everything in it and, by `before`, every line above."""
    body = {"number": number, "time": now, "entry": facts, "before": before}
    digest = hashlib.sha256(_json(body).encode()).hexdigest()
    return f"{_json({**body, 'hash': digest})}\n".encode(), digest


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _open_alone(path: Path) -> int:
    """The file, locked against other writers until it is closed; made where it is missing."""
    try:
        new = not path.exists()
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        if new:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise AuditUnavailable(f"{path}: the log cannot be opened ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise AuditUnavailable(f"{path}: another process writes this log") from None
    return file


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
