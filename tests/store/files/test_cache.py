"""Local copies of objects: read once from a real S3 server, bounded, healed when damaged, never in
verify's way.
"""

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch

from lidit.errors import InputError
from lidit.store import Corpus, TextFamily
from lidit.store.files.folder import Folder
from lidit.store.verify import verify_corpus
from tests.helpers import family_job
from tests.helpers.corpus_factory import WORDS, make_corpus
from tests.helpers.s3_server import s3_server

UNITS = [WORDS, ("one",), ("two", "three"), WORDS[:3]]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with s3_server() as environment:
        before = dict(os.environ)
        os.environ.update(environment)
        url = f"s3://data/{uuid.uuid4().hex}"
        make_corpus(url, UNITS)
        family_job.run(url, "bfloat16")
        yield url
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIDIT_STORE_CACHE", str(tmp_path / "objects"))
    monkeypatch.setenv("LIDIT_STORE_CACHE_GIGABYTES", "1")
    return tmp_path / "objects"


def opened(url: str) -> TextFamily:
    return Corpus.open(url).text_family("fake")


def all_states(family: TextFamily) -> list[torch.Tensor]:
    for unit in range(len(UNITS)):
        family.verify_unit(unit)
    return [state for unit in range(len(UNITS)) for state in family.read(unit)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


def test_what_was_read_once_is_local(url: str, cache: Path) -> None:
    first, family = all_states(opened(url)), opened(url)
    assert len(list(cache.iterdir())) == len(UNITS)
    file_system, root = fsspec.core.url_to_fs(family.folder.location)
    name = family.record(2)["file"]
    content = file_system.cat_file(f"{root}/{name}")
    file_system.rm_file(f"{root}/{name}")
    try:
        assert same(all_states(family), first)
        assert not verify_corpus(url).sound, "verify looked at the local copy"
    finally:
        file_system.pipe_file(f"{root}/{name}", content)


def test_processes_that_want_the_same_unit_fetch_it_once(
    url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, read = [], Folder.read_bytes

    def counted(folder: Folder, name: str) -> bytes:
        fetched.append(name)
        return read(folder, name)

    monkeypatch.setattr(Folder, "read_bytes", counted)
    family = opened(url)
    name = family.record(0)["file"]
    fetched.clear()
    with ThreadPoolExecutor(4) as pool:  # each opens the lock's file for itself, as processes do
        found = list(pool.map(lambda _: bytes(family.folder.map(name, keep_local=True)), range(4)))
    assert fetched == [name]
    assert len(set(found)) == 1


def test_it_stays_below_its_limit(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = all_states(opened(url))
    sizes = [path.stat().st_size for path in cache.iterdir()]
    limit = max(sizes) + min(sizes)
    assert limit < sum(sizes)
    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setenv("LIDIT_STORE_CACHE_GIGABYTES", str(limit / 1e9))
    assert same(all_states(opened(url)), whole)
    assert 0 < sum(path.stat().st_size for path in cache.iterdir()) <= limit
    monkeypatch.setenv("LIDIT_STORE_CACHE_GIGABYTES", "0")
    for path in cache.iterdir():
        path.unlink()
    assert same(all_states(opened(url)), whole)
    assert not list(cache.iterdir())


def test_a_damaged_copy_is_fetched_again(url: str, cache: Path) -> None:
    # the others are views of the copies
    whole = [state.clone() for state in all_states(opened(url))]
    for path in cache.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert same(all_states(opened(url)), whole)


def test_a_damaged_object_is_named_and_not_kept(url: str, cache: Path) -> None:
    family = opened(url)
    file_system, root = fsspec.core.url_to_fs(family.folder.location)
    name = family.record(1)["file"]
    content = file_system.cat_file(f"{root}/{name}")
    file_system.pipe_file(f"{root}/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(InputError, match=f"{name}: damaged"):
            family.verify_unit(1)
        assert not cache.exists() or not list(cache.iterdir())
    finally:
        file_system.pipe_file(f"{root}/{name}", content)
