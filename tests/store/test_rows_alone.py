"""Rows of a unit are read and checked alone: from a URL by ranges, and no reader reads what it does
not use.
"""

import random
import uuid
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from lidit.errors import InputError
from lidit.store import Corpus, TextFamily
from lidit.store.verify import verify_corpus
from tests.helpers import family_job
from tests.helpers.corpus_factory import make_corpus

STORAGES = ["float32", "bfloat16", "int8", "int4", "coded"]
SOME = random.Random(3)
UNITS = [
    [f"{unit} {row} {'token ' * SOME.randint(2, 30)}" for row in range(24)] for unit in range(3)
]
UNITS[1][5] = ""  # a caption without a token


class CountingFileSystem(MemoryFileSystem):
    """A store that counts what is read of each file."""

    protocol = "counting"
    read: Counter[str] = Counter()
    requests: Counter[str] = Counter()

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: object
    ) -> bytes:
        content: bytes = super().cat_file(path, start=start, end=end, **options)
        name = path.rsplit("/", 1)[-1]
        self.read[name] += len(content)
        self.requests[name] += 1
        return content


fsspec.register_implementation("counting", CountingFileSystem)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIDIT_STORE_CACHE", str(tmp_path / "objects"))
    monkeypatch.setenv("LIDIT_STORE_CACHE_GIGABYTES", "1")
    return tmp_path / "objects"


def published(storage: str) -> str:
    url = f"counting://{uuid.uuid4().hex}"
    make_corpus(url, UNITS)
    family_job.run(url, storage)
    CountingFileSystem.read.clear()
    CountingFileSystem.requests.clear()
    return url


def opened(url: str) -> TextFamily:
    return Corpus.open(url).text_family("fake")


def files(family: TextFamily) -> list[str]:
    return family.records["file"].to_pylist()


def bytes_read(family: TextFamily) -> int:
    return sum(CountingFileSystem.read[name] for name in files(family))


@pytest.mark.parametrize("storage", STORAGES)
def test_readers_of_one_window_read_its_bytes_once_in_sum(
    storage: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = published(storage)
    rows = [(unit, row) for unit, captions in enumerate(UNITS) for row in range(len(captions))]
    random.Random(0).shuffle(rows)
    family, readers, found = opened(url), 4, {}
    for reader in range(readers):
        # nodes with disks of their own
        monkeypatch.setenv("LIDIT_STORE_CACHE", str(cache / str(reader)))
        mine = opened(url)
        share = rows[reader::readers]
        mine.fetch({unit: [row for of, row in share if of == unit] for unit in range(len(UNITS))})
        for unit, row in share:
            (found[unit, row],) = mine.read(unit, [row], check=True)
    # 24 channels: a row index is large beside so few
    allowed = 1.05 if storage in ("float32", "bfloat16") else 1.3
    assert bytes_read(family) <= allowed * sum(family.records["bytes"].to_pylist())
    # The same numbers as of whole files.
    for unit in range(len(UNITS)):
        for row, state in enumerate(family.read(unit)):
            assert torch.allclose(found[unit, row], state, rtol=1e-5)


@pytest.mark.parametrize("storage", ["bfloat16", "coded"])
def test_a_row_that_was_read_once_is_local_until_the_copy_goes(storage: str, cache: Path) -> None:
    url = published(storage)
    first = opened(url).read(0, [3, 4])
    before = bytes_read(opened(url))
    again = opened(url)
    assert all(torch.equal(a, b) for a, b in zip(first, again.read(0, [3, 4])))
    index = 24 * (4 + 4 + 8) + 64
    assert bytes_read(again) - before <= index
    before = bytes_read(again)
    again.read(0, [4, 5])  # a part of it is there
    record = again.record(0)
    assert 0 < bytes_read(again) - before < record["bytes"] / 4
    (copy,) = cache.glob("*.rows")
    damaged = bytearray(copy.read_bytes())
    for place in range(len(damaged)):
        damaged[place] ^= 1
    copy.write_bytes(damaged)
    # fetched again
    assert all(torch.equal(a, b) for a, b in zip(first, opened(url).read(0, [3, 4])))
    copy.unlink()
    assert torch.equal(first[0], again.read(0, [3])[0])


def test_without_a_cache_rows_are_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIDIT_STORE_CACHE_GIGABYTES", "0")
    url = published("int8")
    family = opened(url)
    family.fetch({0: [1]})  # nowhere to keep them
    assert bytes_read(family) == 0
    assert torch.equal(family.read(0, [1])[0], family.read(0)[1])


def test_neighbouring_rows_are_one_request(cache: Path) -> None:
    url = published("bfloat16")
    family = opened(url)
    family.read(0, list(range(24)))
    assert CountingFileSystem.requests[files(family)[0]] == 2  # the row index, and all rows


@pytest.mark.parametrize("storage", STORAGES)
def test_a_flipped_bit_in_a_row_is_named_and_other_rows_are_read(
    storage: str, tmp_path: Path
) -> None:
    make_corpus(tmp_path, UNITS)
    family_job.run(str(tmp_path), storage)
    family = opened(str(tmp_path))
    file = family._open(0)
    path = family.folder.path / family.record(0)["file"]
    content = bytearray(path.read_bytes())
    content[int(file.index.states[0][7]) + 5] ^= 4
    path.write_bytes(content)
    damaged = opened(str(tmp_path))
    damaged.read(0, [6, 8], check=True)
    with pytest.raises(InputError, match=f"{path.name}: row 7 is damaged.*lidit embed"):
        damaged.read(0, [6, 7, 8], check=True)
    assert not verify_corpus(str(tmp_path)).sound


def test_a_damaged_row_behind_a_url_is_refused_whoever_asks(cache: Path) -> None:
    url = published("int8")
    family = opened(url)
    name = family.record(0)["file"]
    place = int(family._open(0).index.scales[0][2])
    system, root = fsspec.core.url_to_fs(family.folder.location)
    content = bytearray(system.cat_file(f"{root}/{name}"))
    content[place] ^= 1
    system.pipe_file(f"{root}/{name}", bytes(content))
    with pytest.raises(InputError, match="row 2 is damaged"):
        opened(url).read(0, [2])


def test_a_damaged_row_index_is_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path, UNITS)
    family_job.run(str(tmp_path), "int8")
    family = opened(str(tmp_path))
    record = family.record(0)
    path = family.folder.path / record["file"]
    content = bytearray(path.read_bytes())
    content[record["index"][0][2]] ^= 1  # the first row's checksum
    path.write_bytes(content)
    with pytest.raises(InputError, match="row index differs from its record"):
        opened(str(tmp_path)).read(0, [1])


def test_files_without_row_checksums_are_compared_as_a_whole() -> None:
    released = Path(__file__).parents[1] / "fixtures" / "first_release" / "corpus"
    family = Corpus.open(released).text_family("qwen2")
    assert "index" not in family.record(0)
    assert not family._open(0).has_checksums
    states = family.read(0, [1], check=True)
    assert torch.equal(states[0], family.read(0)[1])
    assert 0 in family._verified


def test_the_cache_keeps_its_limit_with_parts_of_files(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = published("float32")
    monkeypatch.setenv("LIDIT_STORE_CACHE_GIGABYTES", str(250_000 / 1e9))
    family = opened(url)
    for unit in range(len(UNITS)):
        family.read(unit, list(range(0, 24, 2)))
    # of three copies of 232 KB
    assert sum(copy.stat().st_size for copy in cache.iterdir()) < 300_000
    assert torch.equal(family.read(0, [2])[0], family.read(0)[2])
