"""API keys and their quotas, in one sqlite file that any number of processes on a machine may
share.

`lidit.serving.shared_keys` keeps the same in Redis.

A key's text is `lidit_<id>_<secret>`: the prefix lets scanners of repositories recognise it, the id
finds its row, and only a sha256 of the whole text is stored. The secret has 160 random bits, so a
fast hash is enough.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lidit.errors import InputError, one_line

PREFIX = "lidit_"
ID_BYTES, SECRET_BYTES = 5, 20
WRITTEN = re.compile(
    rf"{PREFIX}([0-9a-f]{{{2 * ID_BYTES}}})_[0-9a-f]{{{2 * SECRET_BYTES}}}", re.ASCII
)
SCOPES = ("generate", "moderate", "verify", "admin")
DAY = 86400
WAIT = 5.0  # seconds for another process's transaction
Denial = Literal["unknown", "revoked", "expired", "scope"]
SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, scopes TEXT NOT NULL, created REAL NOT NULL,
    expires REAL, revoked REAL, quota INTEGER, period INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS used (
    key TEXT NOT NULL, period_start INTEGER NOT NULL, units INTEGER NOT NULL, PRIMARY KEY (key, period_start)
) STRICT;
"""  # noqa: E501


class KeysUnavailable(Exception):
    """The keys cannot be used: nobody may enter until it can. The gateway answers 503."""


class KeyDenied(Exception):
    """This key may not do this. `reason` is for the server's log; 401, or 403 for "scope", is for
    the client.
    """

    def __init__(self, reason: Denial, key_id: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.key_id = reason, key_id


class QuotaExceeded(Exception):
    """The key's compute units of this period do not suffice. `retry_after`: seconds until the next
    period.
    """

    def __init__(self, left: int, retry_after: float) -> None:
        super().__init__(f"{left} compute units are left in this period")
        self.left, self.retry_after = left, retry_after


@dataclass(frozen=True)
class Key:
    """What is known of a key; its text is known to its owner alone.

    created, expires, revoked: seconds since 1970. quota: compute units (pixels x steps) per
    `period` seconds; None: no limit. Periods begin at multiples of their length, a day at midnight
    UTC.
    """

    id: str
    name: str
    scopes: frozenset[str]
    created: float
    expires: float | None = None
    revoked: float | None = None
    quota: int | None = None
    period: int = DAY


class KeyStore:
    """Keys and what they used. Threads and processes share a store: each call opens the file anew.

    `create=False` wants an existing file. Raises KeysUnavailable wherever the file cannot be read
    or written.
    """

    def __init__(
        self, path: Path, create: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self._clock = path, clock
        if create:
            self._create()
        self.list()  # a file that is missing, damaged or of another kind is found now

    def add(
        self,
        name: str,
        scopes: Collection[str] = ("generate",),
        expires: float | None = None,
        quota: int | None = None,
        period: int = DAY,
    ) -> tuple[str, Key]:
        """A new key: its text, which nothing keeps, and its row. Raises InputError for what makes
        no sense.
        """
        key = new_key(Key("", name, frozenset(scopes), self._clock(), expires, None, quota, period))
        text = f"{PREFIX}{key.id}_{secrets.token_hex(SECRET_BYTES)}"
        row = (
            key.id, name, digest_of(text), " ".join(sorted(key.scopes)), key.created, expires, None,
            quota, period
        )  # fmt: skip
        with self._transaction() as database:
            database.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        return text, key

    def list(self) -> list[Key]:
        """Every key, oldest first; revoked and expired ones too."""
        with self._transaction(write=False) as database:
            return [
                _key(row) for row in database.execute("SELECT * FROM keys ORDER BY created, id")
            ]

    def revoke(self, key_id: str) -> Key:
        """Refuse this key from now on, in every process. Raises InputError for an id that no key
        has.
        """
        with self._transaction() as database:
            database.execute(
                "UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL",
                (self._clock(), key_id),
            )
            row = database.execute("SELECT * FROM keys WHERE id = ?", (key_id,)).fetchone()
        if row is None:
            raise InputError(
                f"{self.path}: no key has the id {key_id!r}; lidit keys list shows all"
            )
        return _key(row)

    def check(self, text: str, scope: str) -> Key:
        """The key with this text. Raises KeyDenied for a key that is not known, not valid, or lacks
        the scope.
        """
        row = None
        if key_id := id_in(text):
            with self._transaction(write=False) as database:
                row = database.execute("SELECT * FROM keys WHERE id = ?", (key_id,)).fetchone()
        return admitted(
            text, None if row is None else (_key(row), row["digest"]), scope, self._clock()
        )

    def charge(self, key_id: str, units: int) -> int | None:
        """Take compute units from the key's quota; what is left after them, None without a quota.

        Raises QuotaExceeded, and takes nothing, where too few are left; KeyDenied for a key that is
        gone or revoked.
        """
        if units < 0:
            raise ValueError(f"{units} compute units: give 0 or more; `refund` gives back")
        with self._transaction() as database:
            row = database.execute("SELECT * FROM keys WHERE id = ?", (key_id,)).fetchone()
            if row is None or row["revoked"] is not None:
                raise KeyDenied("unknown" if row is None else "revoked", key_id)
            key, now = _key(row), self._clock()
            start = period_start(now, key.period)
            left = left_after(key, units, _used(database, key_id, start), now)
            _add(database, key_id, start, units)
        return left

    def refund(self, key_id: str, units: int, charged: float) -> None:
        """Give units back that were charged at time `charged`: of work that was cancelled or
        failed.

        They return to the period they were taken from, so a refund never lends units of a later
        one.
        """
        with self._transaction() as database:
            row = database.execute("SELECT * FROM keys WHERE id = ?", (key_id,)).fetchone()
            if row is not None:
                start = period_start(charged, row["period"])
                _add(database, key_id, start, -min(units, _used(database, key_id, start)))

    def used(self, key: Key) -> int:
        """Compute units of the key's present period."""
        with self._transaction(write=False) as database:
            return _used(database, key.id, period_start(self._clock(), key.period))

    def _create(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise KeysUnavailable(f"{self.path}: cannot be made ({error.strerror})") from None
        with self._transaction() as database:
            for statement in filter(str.strip, SCHEMA.split(";")):
                database.execute(statement)

    @contextlib.contextmanager
    def _transaction(self, write: bool = True) -> Iterator[sqlite3.Connection]:
        """A connection within a transaction, which an exception takes back. `mode=rw` never makes a
        file.
        """
        try:
            with contextlib.closing(
                sqlite3.connect(
                    f"{self.path.absolute().as_uri()}?mode=rw",
                    uri=True,
                    timeout=WAIT,
                    isolation_level=None,
                )
            ) as database:
                database.row_factory = sqlite3.Row
                database.execute("PRAGMA synchronous = FULL")
                database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    yield database
                except BaseException:
                    database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise KeysUnavailable(
                f"{self.path}: the keys cannot be used ({one_line(error, 200)})"
            ) from None


def new_key(asked: Key) -> Key:
    """The key that is asked for, with an id. Raises InputError for what makes no sense."""
    if not asked.name.strip() or not asked.name.isprintable() or len(asked.name) > 100:
        raise InputError("a key needs a name of 1 to 100 printable characters, such as its owner's")
    if unknown := sorted(asked.scopes - set(SCOPES)):
        raise InputError(f"scope {unknown[0]!r}: scopes are {', '.join(SCOPES)}")
    if not asked.scopes or asked.period < 1 or (asked.quota is not None and asked.quota < 1):
        raise InputError(
            "a key needs a scope, a period of at least a second and a quota of at least one unit"
        )
    if asked.expires is not None and asked.expires <= asked.created:
        raise InputError("the key would have expired already; give a time to come")
    return replace(asked, id=secrets.token_hex(ID_BYTES))


def id_in(text: str) -> str | None:
    """The id in a key's text, for which there may be no key."""
    match = WRITTEN.fullmatch(text)
    return match[1] if match else None


def admitted(text: str, found: tuple[Key, str] | None, scope: str, now: float) -> Key:
    """The key, of which `found` are the facts and the digest that its id led to.
    Raises KeyDenied.
    """
    # An unknown id takes as long as a wrong secret.
    same = hmac.compare_digest(digest_of(text), found[1] if found else "0" * 64)
    if found is None or not same:
        raise KeyDenied("unknown")
    key = found[0]
    if key.revoked is not None:
        raise KeyDenied("revoked", key.id)
    if key.expires is not None and key.expires <= now:
        raise KeyDenied("expired", key.id)
    if scope not in key.scopes:
        raise KeyDenied("scope", key.id)
    return key


def left_after(key: Key, units: int, used: int, now: float) -> int | None:
    """What is left of the quota when `units` more are used; None without a quota. Raises
    QuotaExceeded.
    """
    if key.quota is None:
        return None
    if used + units > key.quota:
        raise QuotaExceeded(
            max(key.quota - used, 0), period_start(now, key.period) + key.period - now
        )
    return key.quota - used - units


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _key(row: sqlite3.Row) -> Key:
    values = {name: row[name] for name in row.keys() if name not in ("digest", "scopes")}  # noqa: SIM118
    return Key(scopes=frozenset(row["scopes"].split()), **values)


def period_start(now: float, period: int) -> int:
    return int(now // period) * period


def _used(database: sqlite3.Connection, key_id: str, start: int) -> int:
    row = database.execute(
        "SELECT units FROM used WHERE key = ? AND period_start = ?", (key_id, start)
    ).fetchone()
    return row["units"] if row else 0


def _add(database: sqlite3.Connection, key_id: str, start: int, units: int) -> None:
    database.execute(
        "INSERT INTO used VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET units = units + "
        "excluded.units",
        (key_id, start, units),
    )
