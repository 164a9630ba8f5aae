"""The audit log: each line holds to the one before it, a fault is found where it is, nothing goes
on unlogged.
"""

from __future__ import annotations

import json
import resource
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from lidit.errors import InputError
from lidit.serving.audit import (
    START,
    AuditLog,
    AuditUnavailable,
    ChainBroken,
    Entry,
    check_chain,
    load_key,
)

KEY = bytes(range(32))
PROMPT = "a naked emperor on a horse"


def written(path: Path, count: int = 5) -> list[str]:
    """The hashes of a log's lines."""
    log = AuditLog(path, KEY)
    hashes = [
        log.append(Entry(event="accepted", request=f"request-{number}")) for number in range(count)
    ]
    log.close()
    return hashes


def test_a_log_is_a_chain_that_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    first = written(path, 3)
    assert check_chain(path).head == first[-1]
    second = written(path, 2)
    chain = check_chain(path)
    assert (chain.lines, chain.head) == (5, second[-1])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["before"] == START
    assert [line["before"] for line in lines[1:]] == [line["hash"] for line in lines[:-1]]
    assert lines[3]["entry"] == {"event": "accepted", "request": "request-0"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def changed(line: bytes) -> bytes:
    return line.replace(b"request-", b"Request-")


def renumbered(line: bytes) -> bytes:
    return line.replace(b'"number":3', b'"number":4')


# What is done to the third line, and the line where it is noticed.
FAULTS: dict[str, tuple[Callable[[list[bytes]], list[bytes]], int]] = {
    "changed": (lambda lines: [*lines[:2], changed(lines[2]), *lines[3:]], 3),
    "renumbered": (lambda lines: [*lines[:2], renumbered(lines[2]), *lines[3:]], 3),
    "taken out": (lambda lines: [*lines[:2], *lines[3:]], 3),
    "doubled": (lambda lines: [*lines[:3], *lines[2:]], 4),
    "exchanged": (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 3),
    "spaced": (lambda lines: [*lines[:2], lines[2].replace(b":", b": ", 1), *lines[3:]], 3),
    "a key more": (
        lambda lines: [*lines[:2], lines[2].replace(b"{", b'{"note":1,', 1), *lines[3:]],
        3,
    ),
    "no JSON": (lambda lines: [*lines[:2], b"note\n", *lines[2:]], 3),
    "a list": (lambda lines: [*lines[:2], b"[]\n", *lines[2:]], 3),
    "an empty line": (lambda lines: [*lines[:2], b"\n", *lines[2:]], 3),
    "no text": (lambda lines: [*lines[:2], b"\xff\xfe\n", *lines[2:]], 3),
    "a very long line": (lambda lines: [*lines[:2], b"9" * 200_000 + b"\n", *lines[2:]], 3),
    "last line cut off": (lambda lines: [*lines[:4], lines[4][:-5]], 5),
    "last end of line cut off": (lambda lines: [*lines[:4], lines[4][:-1]], 5),
}


@pytest.mark.parametrize(("fault", "line"), FAULTS.values(), ids=FAULTS)
def test_the_first_bad_line_is_named_and_never_continued(
    tmp_path: Path, fault: Callable[[list[bytes]], list[bytes]], line: int
) -> None:
    path = tmp_path / "audit.jsonl"
    written(path)
    path.write_bytes(b"".join(fault(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    with pytest.raises(ChainBroken) as broken:
        check_chain(path)
    assert broken.value.line == line
    with pytest.raises(AuditUnavailable, match=f"line {line}: "):
        AuditLog(path, KEY)
    assert path.read_bytes() == before


def test_a_head_that_was_noted_finds_what_was_cut_off_or_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    hashes = written(path)
    assert check_chain(path, hashes[2]).lines == 5
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    assert check_chain(path).lines == 3
    assert check_chain(path, hashes[2]).lines == 3
    with pytest.raises(ChainBroken, match="cut off or written anew"):
        check_chain(path, hashes[4])


def test_a_full_disk_stops_the_log_and_leaves_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, KEY)
    log.append(Entry(event="started"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(AuditUnavailable, match="cannot be written"):
            log.append(Entry(event="accepted"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # It does not go on by itself, even if there is room now: an operator has to look.
    with pytest.raises(AuditUnavailable, match="cannot be written"):
        log.append(Entry(event="accepted"))
    assert check_chain(path).lines == 1
    log.close()
    written(path, 1)
    assert check_chain(path).lines == 2


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", KEY)
    with pytest.raises(AuditUnavailable, match="another process"):
        AuditLog(tmp_path / "audit.jsonl", KEY)
    log.close()
    with pytest.raises(AuditUnavailable, match="closed"):
        log.append(Entry(event="stopped"))
    AuditLog(tmp_path / "audit.jsonl", KEY).close()


def move_away(path: Path) -> None:
    path.rename(path.with_name("old"))


def replace(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def add_a_line(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"{}\n")


@pytest.mark.parametrize("disturb", [move_away, replace, add_a_line, Path.unlink])
def test_a_log_that_others_touch_stops(tmp_path: Path, disturb: Callable[[Path], object]) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, KEY)
    log.append(Entry(event="started"))
    disturb(path)
    with pytest.raises(AuditUnavailable):
        log.append(Entry(event="accepted"))
    log.close()


def test_threads_share_a_log(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", KEY)
    with ThreadPoolExecutor(8) as pool:
        hashes = list(
            pool.map(lambda number: log.append(Entry(event="accepted", seed=number)), range(100))
        )
    chain = check_chain(log.path)
    assert chain.lines == 100 == len(set(hashes))
    assert chain.head in hashes
    log.close()


def test_a_prompt_stands_in_no_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", KEY)
    log.append(Entry(event="prompt-refused", prompt=log.digest(PROMPT), guard="words-0123456789ab"))
    for field in ("request", "key", "prompt", "guard", "model", "image", "manifest", "event"):
        with pytest.raises(ValidationError):
            Entry(**{"event": "prompt-refused", field: PROMPT})  # type: ignore[arg-type]
        # Nor by a way around the checks.
        with pytest.raises(ValidationError) as refused:
            log.append(Entry(event="accepted").model_copy(update={field: PROMPT}))
        assert PROMPT not in str(refused.value)
    with pytest.raises(ValidationError):
        Entry(event="prompt-refused", text=PROMPT)  # type: ignore[call-arg]
    content = log.path.read_text()
    assert check_chain(log.path).lines == 1
    assert not any(word in content for word in PROMPT.split() if len(word) > 2)
    log.close()


def test_digests_are_the_same_for_the_same_words_and_key_alone(tmp_path: Path) -> None:
    logs = [
        AuditLog(tmp_path / name, key) for name, key in (("a", KEY), ("b", KEY), ("c", bytes(32)))
    ]
    first, second, third = (log.digest(PROMPT) for log in logs)
    assert first == second != third
    assert first != logs[0].digest(PROMPT + " ")
    for log in logs:
        log.close()


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    key = load_key(tmp_path / "key")
    assert key == load_key(tmp_path / "key") != load_key(tmp_path / "other")
    assert len(key) == 32
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(InputError, match="short: an audit key has 32 bytes"):
        load_key(tmp_path / "short")
    with pytest.raises(InputError):
        AuditLog(tmp_path / "audit.jsonl", b"")


def test_what_is_no_log_is_the_users_mistake(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            check_chain(path)
    with pytest.raises(AuditUnavailable, match="cannot be opened"):
        AuditLog(tmp_path / "no" / "folder", KEY)
