"""Keys: shown once, stored as a hash, refused the moment they are revoked; quotas that no race can
pass.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lidit.errors import InputError
from lidit.serving.keys import (
    DAY,
    PREFIX,
    WRITTEN,
    KeyDenied,
    KeyStore,
    KeysUnavailable,
    QuotaExceeded,
)
from tests.helpers.clock import NOON, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> KeyStore:
    return KeyStore(tmp_path / "keys.sqlite", create=True, clock=clock)


def denied(store: KeyStore, text: str, scope: str = "generate") -> str:
    with pytest.raises(KeyDenied) as denial:
        store.check(text, scope)
    assert not text or text not in str(denial.value)
    return denial.value.reason


def test_a_key_has_enough_chance_in_it_and_can_be_recognised(store: KeyStore) -> None:
    texts = [store.add("a")[0] for _ in range(50)]
    assert len(set(texts)) == 50
    for text in texts:
        assert text.startswith(PREFIX)
        assert WRITTEN.fullmatch(text)
    secrets = [text.rsplit("_", 1)[1] for text in texts]
    assert all(4 * len(secret) >= 128 for secret in secrets)
    # No digit of the secret is the same in all keys.
    assert all(len(set(column)) > 4 for column in zip(*secrets))


def test_only_a_hash_is_stored_and_only_the_owner_reads_it(store: KeyStore) -> None:
    text, key = store.add("alice", quota=5)
    assert store.check(text, "generate") == key
    for file in store.path.parent.iterdir():
        content = file.read_bytes()
        assert text.encode() not in content
        assert text.rsplit("_", 1)[1].encode() not in content
    with sqlite3.connect(store.path) as database:
        assert database.execute("SELECT digest FROM keys").fetchone() == (
            hashlib.sha256(text.encode()).hexdigest(),
        )
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert text not in repr(store.list())


@pytest.mark.parametrize("change", ["", "x", "\n", "\0", "\ud800", "é"])
def test_a_text_that_is_not_the_keys_is_unknown(store: KeyStore, change: str) -> None:
    text, _ = store.add("alice")
    assert store.check(text, "generate")
    assert denied(store, text[:-1] + change) == "unknown"
    last = "0" if text[-1] != "0" else "1"
    assert denied(store, text[:-1] + last) == "unknown"
    assert denied(store, "' OR 1=1 --") == "unknown"
    assert denied(store, "") == "unknown"


def test_scopes_and_expiry_are_held(store: KeyStore, clock: Clock) -> None:
    text, key = store.add("alice", scopes=["verify"], expires=clock.now + 10)
    assert denied(store, text, "generate") == "scope"
    assert store.check(text, "verify").id == key.id
    clock.now += 10
    assert denied(store, text, "verify") == "expired"


def test_a_revoked_key_is_refused_by_stores_that_are_open(store: KeyStore) -> None:
    text, key = store.add("alice", quota=10)
    other = KeyStore(store.path)
    assert other.check(text, "generate")
    revoked = store.revoke(key.id)
    assert revoked.revoked == NOON
    assert denied(other, text) == "revoked"
    with pytest.raises(KeyDenied):
        other.charge(key.id, 1)
    assert store.revoke(key.id).revoked == NOON
    with pytest.raises(InputError, match="no key has the id"):
        store.revoke("0123456789")


def test_a_quota_is_of_units_and_of_a_period(store: KeyStore, clock: Clock) -> None:
    _, key = store.add("alice", quota=100)
    assert store.charge(key.id, 60) == 40
    with pytest.raises(QuotaExceeded) as exceeded:
        store.charge(key.id, 41)
    assert exceeded.value.left == 40
    assert exceeded.value.retry_after == DAY / 2
    assert store.charge(key.id, 40) == 0
    assert store.used(key) == 100
    clock.now += DAY / 2
    assert store.charge(key.id, 100) == 0


def test_refunds_return_to_the_period_they_came_from(store: KeyStore, clock: Clock) -> None:
    _, key = store.add("alice", quota=100)
    store.charge(key.id, 100)
    charged = clock.now
    store.refund(key.id, 30, charged)
    assert store.used(key) == 70
    store.refund(key.id, 1000, charged)
    assert store.used(key) == 0
    store.charge(key.id, 50)
    clock.now += DAY
    store.charge(key.id, 20)
    store.refund(key.id, 50, charged)
    assert store.used(key) == 20
    with pytest.raises(ValueError, match="refund"):
        store.charge(key.id, -1)


def test_a_key_without_a_quota_is_counted_and_not_limited(store: KeyStore) -> None:
    _, key = store.add("alice")
    assert store.charge(key.id, 10**12) is None
    assert store.used(key) == 10**12


def test_no_race_takes_more_than_the_quota(store: KeyStore) -> None:
    _, key = store.add("alice", quota=25)

    def take(number: int) -> int:
        try:
            KeyStore(store.path, clock=lambda: NOON).charge(key.id, 1)
        except QuotaExceeded:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(40))) == 25
    assert store.used(key) == 25


@pytest.mark.parametrize(
    "wrong",
    [{"name": ""}, {"name": "a\nb"}, {"name": "a" * 101}, {"scopes": []}, {"scopes": ["root"]},
     {"quota": 0},
     {"period": 0}, {"expires": NOON - 1}],
)  # fmt: skip
def test_a_key_that_makes_no_sense_is_refused(store: KeyStore, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        store.add(**{"name": "alice", **wrong})  # type: ignore[arg-type]
    assert store.list() == []


def test_a_store_that_cannot_be_used_lets_nobody_in(store: KeyStore, tmp_path: Path) -> None:
    text, key = store.add("alice")
    with pytest.raises(KeysUnavailable):
        KeyStore(tmp_path / "absent.sqlite")
    assert not (tmp_path / "absent.sqlite").exists()
    store.path.write_bytes(b"no database" * 1000)
    for use in (lambda: store.check(text, "generate"), lambda: store.charge(key.id, 1), store.list):
        with pytest.raises(KeysUnavailable):
            use()
    store.path.unlink()
    with pytest.raises(KeysUnavailable):
        store.check(text, "generate")
    assert not store.path.exists()


def test_a_store_that_is_locked_for_good_lets_nobody_in(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lidit.serving.keys.WAIT", 0.05)
    text, _ = store.add("alice")
    with sqlite3.connect(store.path) as database:
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(KeysUnavailable, match=re.escape(str(store.path))):
            store.check(text, "generate")
    database.close()
