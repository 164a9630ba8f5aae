"""API keys and their quotas in Redis, for a ledger that may start on another machine.

The same rows and the same rules as in `lidit.serving.keys`; a quota is charged in one transaction
of the server, which whoever else has charged in between makes begin anew. The password comes by
LIDIT_REDIS_PASSWORD, never in an address. Keys live as long as the server keeps them: it needs
`appendonly yes`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from lidit.errors import InputError, one_line
from lidit.serving.keys import (
    DAY,
    PREFIX,
    SECRET_BYTES,
    WAIT,
    Key,
    KeyDenied,
    KeyStore,
    KeysUnavailable,
    admitted,
    digest_of,
    id_in,
    left_after,
    new_key,
    period_start,
)

SCHEMES = ("redis://", "rediss://", "unix://")
PASSWORD = "LIDIT_REDIS_PASSWORD"  # the name of a variable
ROWS = "lidit:keys"  # a hash: id -> a key's facts and digest as JSON
KEPT_PERIODS = 2  # of what was used: a refund may come when the next period has begun


class Keys(Protocol):
    """Where keys are kept; see `KeyStore` for what each call does and raises."""

    def add(
        self,
        name: str,
        scopes: Collection[str] = ("generate",),
        expires: float | None = None,
        quota: int | None = None,
        period: int = DAY,
    ) -> tuple[str, Key]: ...

    def list(self) -> list[Key]: ...
    def revoke(self, key_id: str) -> Key: ...
    def check(self, text: str, scope: str) -> Key: ...
    def charge(self, key_id: str, units: int) -> int | None: ...
    def refund(self, key_id: str, units: int, charged: float) -> None: ...
    def used(self, key: Key) -> int: ...


def open_keys(place: str | Path, create: bool = False) -> Keys:
    """The keys at an address of Redis, or in a file. Raises KeysUnavailable."""
    if str(place).startswith(SCHEMES):
        return RedisKeyStore(str(place))
    return KeyStore(Path(place), create)


class RedisKeyStore:
    """Keys and what they used, at `address`: `redis://host:6379/0`, `rediss://` with TLS. Any
    number of processes.
    """

    def __init__(self, address: str, clock: Callable[[], float] = time.time) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise KeysUnavailable(
                f"{address}: the client is not installed; pip install redis"
            ) from None
        self.address, self._clock = address, clock
        self._errors: type[Exception] = redis.RedisError
        try:
            # Nothing is sent twice: units whose answer was lost might be charged twice.
            self._server: Any = redis.Redis.from_url(
                address, password=os.environ.get(PASSWORD), socket_timeout=WAIT,
                socket_connect_timeout=WAIT,
                decode_responses=True, retry=Retry(NoBackoff(), 0),
            )  # fmt: skip
        except ValueError as error:
            raise KeysUnavailable(f"{address}: {one_line(error, 200)}") from None
        self.list()  # a server that is not there is found now

    def add(
        self,
        name: str,
        scopes: Collection[str] = ("generate",),
        expires: float | None = None,
        quota: int | None = None,
        period: int = DAY,
    ) -> tuple[str, Key]:
        key = new_key(Key("", name, frozenset(scopes), self._clock(), expires, None, quota, period))
        text = f"{PREFIX}{key.id}_{secrets.token_hex(SECRET_BYTES)}"
        with self._told():
            self._server.hset(ROWS, key.id, _row(key, digest_of(text)))
        return text, key

    def list(self) -> list[Key]:
        with self._told():
            rows = self._server.hvals(ROWS)
        return sorted((_found(row)[0] for row in rows), key=lambda key: (key.created, key.id))

    def revoke(self, key_id: str) -> Key:
        def change(pipe: Any) -> Key:
            row = pipe.hget(ROWS, key_id)
            if row is None:
                raise InputError(
                    f"{self.address}: no key has the id {key_id!r}; lidit keys list shows all"
                )
            key, digest = _found(row)
            if key.revoked is None:
                key = replace(key, revoked=self._clock())
            pipe.multi()
            pipe.hset(ROWS, key_id, _row(key, digest))
            return key

        with self._told():
            revoked: Key = self._server.transaction(change, ROWS, value_from_callable=True)
        return revoked

    def check(self, text: str, scope: str) -> Key:
        row = None
        if key_id := id_in(text):
            with self._told():
                row = self._server.hget(ROWS, key_id)
        return admitted(text, None if row is None else _found(row), scope, self._clock())

    def charge(self, key_id: str, units: int) -> int | None:
        if units < 0:
            raise ValueError(f"{units} compute units: give 0 or more; `refund` gives back")
        key, now = self._key(key_id), self._clock()
        place = _place(key, now)

        def take(pipe: Any) -> int | None:
            # A key that is revoked meanwhile is refused: its row is watched, too.
            current = _found(pipe.hget(ROWS, key_id))[0]
            if current.revoked is not None:
                raise KeyDenied("revoked", key_id)
            left = left_after(current, units, int(pipe.get(place) or 0), now)
            pipe.multi()
            pipe.incrby(place, units)
            pipe.expire(place, KEPT_PERIODS * key.period)
            return left

        with self._told():
            left: int | None = self._server.transaction(take, ROWS, place, value_from_callable=True)
        return left

    def refund(self, key_id: str, units: int, charged: float) -> None:
        try:
            place = _place(self._key(key_id), charged)
        except KeyDenied:  # there is no such key any more
            return

        def give(pipe: Any) -> None:
            used = int(pipe.get(place) or 0)
            pipe.multi()
            if used:
                pipe.decrby(place, min(units, used))

        with self._told():
            self._server.transaction(give, place)

    def used(self, key: Key) -> int:
        with self._told():
            return int(self._server.get(_place(key, self._clock())) or 0)

    def _key(self, key_id: str) -> Key:
        with self._told():
            row = self._server.hget(ROWS, key_id)
        if row is None:
            raise KeyDenied("unknown", key_id)
        return _found(row)[0]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever goes wrong with the server or with what it holds: nobody enters."""
        try:
            yield
        except (self._errors, OSError) as error:
            raise KeysUnavailable(
                f"{self.address}: the keys cannot be used ({one_line(error, 200)})"
            ) from None


def _row(key: Key, digest: str) -> str:
    return json.dumps(asdict(key) | {"scopes": sorted(key.scopes), "digest": digest})


def _found(row: str) -> tuple[Key, str]:
    """A key and its digest. Raises KeysUnavailable for a row that none of ours has written."""
    try:
        facts = json.loads(row)
        digest, scopes = str(facts.pop("digest")), frozenset(facts.pop("scopes"))
        return Key(scopes=scopes, **facts), digest
    except (ValueError, KeyError, TypeError, AttributeError):
        raise KeysUnavailable(f"{ROWS}: a key's row cannot be read") from None


def _place(key: Key, now: float) -> str:
    return f"lidit:used:{key.id}:{period_start(now, key.period)}"
