"""Object stores: sources read from, corpora and families written to, a real S3 server."""

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import botocore.exceptions
import fsspec
import pytest
import torch

from lidit.errors import InputError, StorageError
from lidit.sources import FieldNames, OpenedSource, RawSample, expand, read_source
from lidit.store import Corpus
from lidit.store import writer as writer_module
from lidit.store.files.folder import Folder
from lidit.store.files.remote import plain_refusals
from lidit.store.repair import repair_corpus
from lidit.store.verify import verify_corpus
from tests.helpers import family_job
from tests.helpers.command import lidit
from tests.helpers.corpus_factory import WORDS, make_corpus
from tests.helpers.pictures import sample, write_tar
from tests.helpers.s3_server import s3_server

UNITS = [WORDS, ("one",)]


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        before = dict(os.environ)
        os.environ.update(environment)
        yield environment
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def url(server: dict[str, str]) -> str:
    return f"s3://data/{uuid.uuid4().hex}"


def test_family_on_s3_is_the_local_one(url: str, tmp_path: Path) -> None:
    make_corpus(url, UNITS)
    make_corpus(tmp_path / "local", UNITS)
    assert family_job.run(url, "int8") == [0, 1]
    assert family_job.run(url, "int8") == []
    family_job.run(str(tmp_path / "local"), "int8")
    remote, local = (
        Corpus.open(url).text_family("fake"),
        Corpus.open(tmp_path / "local").text_family("fake"),
    )
    assert remote.digest == local.digest
    for unit in range(2):
        remote.verify_unit(unit)
        assert all(torch.equal(a, b) for a, b in zip(remote.read(unit), local.read(unit)))
    assert verify_corpus(url, deep=True).sound


def test_the_mark_of_a_folder_made_in_a_console_is_no_file(url: str) -> None:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.put_object(Bucket=bucket, Key=f"{key}/", Body=b"")
    assert Folder.at(url).sizes() == {}
    client.put_object(Bucket=bucket, Key=f"{key}/text/", Body=b"")
    client.put_object(Bucket=bucket, Key=f"{key}/a file", Body=b"1234")
    assert Folder.at(url).sizes() == {"a file": 4}
    assert Folder.at(url).folders() == ["text"]


def test_lost_and_damaged_objects_are_found_and_computed_again(url: str) -> None:
    make_corpus(url, UNITS)
    family_job.run(url, "bfloat16")
    family = Corpus.open(url).text_family("fake")
    file_system, root = fsspec.core.url_to_fs(family.folder.location)
    target = f"{root}/{family.record(0)['file']}"
    content = bytearray(file_system.cat_file(target))
    content[len(content) // 2] ^= 1
    file_system.pipe_file(target, bytes(content))
    with pytest.raises(InputError, match=family.record(0)["file"]):
        Corpus.open(url).text_family("fake").verify_unit(0)
    repair_corpus(url, verify_corpus(url).problems)
    assert family_job.run(url, "bfloat16") == [0]
    assert verify_corpus(url).sound
    file_system.rm_file(target)
    assert family_job.run(url, "bfloat16") == [0]


def test_orphans_are_removed_only_once_they_are_old(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(url, UNITS)
    writer = family_job.open_writer(url, "float32")
    writer.write_shared(family_job.shared())
    file_system, root = fsspec.core.url_to_fs(writer.folder.location)
    file_system.pipe_file(
        f"{root}/00000-0123456789ab.arrow", b"an upload whose record may still come"
    )
    writer.pending()
    assert writer.folder.exists("00000-0123456789ab.arrow")
    monkeypatch.setattr(writer_module, "OBJECT_STORE_GRACE_SECONDS", -1e9)
    writer.pending()
    assert not writer.folder.exists("00000-0123456789ab.arrow")


def test_sources_on_s3_by_name_folder_and_glob(url: str, tmp_path: Path) -> None:
    file_system, root = fsspec.core.url_to_fs(url)
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", sample(f"s{i}", f"caption {i}"))
        file_system.put_file(str(tmp_path / f"{i}.tar"), f"{root}/shards/{i}.tar")
    for source in ([f"{url}/shards"], [f"{url}/shards/*.tar"], [f"{url}/shards/{{0..1}}.tar"]):
        base, files, *_ = expand(source)
        assert (base, [f.name for f in files]) == (f"{url}/shards", ["0.tar", "1.tar"])
    opened = OpenedSource(files[1])
    (found,) = read_source(opened, FieldNames({}, (), False))
    assert isinstance(found, RawSample)
    assert found.captions == (("caption 1", "original"),)
    with pytest.raises(InputError, match="nothing here to ingest"):
        expand([f"{url}/absent"])


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Someone without keys, profile or a cloud machine's role. Nothing of an earlier server is
    found again.
    """
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert lidit(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_without_credentials_one_line_says_what_to_set(
    stranger: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remedy = (
        "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
        "AWS_ENDPOINT_URL outside AWS)"
    )
    place = f"s3://{uuid.uuid4().hex}/corpus"  # file systems are kept per address
    assert refused(capsys, "inspect", place) == f"error: {place}: {remedy}"
    source = f"s3://{uuid.uuid4().hex}/x"
    assert refused(capsys, "ingest", source, "--corpus", "c") == f"error: {source}: {remedy}"


def test_an_endpoint_that_does_not_answer(
    stranger: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        stranger.setenv(name, "test")
    stranger.setenv("AWS_MAX_ATTEMPTS", "1")
    stranger.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    place = f"s3://{uuid.uuid4().hex}/corpus"
    told = refused(capsys, "inspect", place)
    assert told.startswith(f"error: {place}: no answer (Could not connect to the endpoint URL")
    assert told.endswith("check the network and AWS_ENDPOINT_URL")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    stranger.setenv("AWS_ENDPOINT_URL", "nonsense")
    assert "Invalid endpoint: nonsense" in refused(
        capsys, "inspect", f"s3://{uuid.uuid4().hex}/corpus"
    )


def test_what_is_a_refusal_and_what_is_not() -> None:
    for error, told in (
        (
            PermissionError("Forbidden"),
            "access refused (Forbidden); give credentials that may read and write there",
        ),
        (
            ConnectionError("http://me:pass@h/x is gone"),
            "no answer (http://h/x is gone); check the network",
        ),
        (TimeoutError(), "no answer (TimeoutError); check the network and AWS_ENDPOINT_URL"),
        (
            OSError(22, "wrong region"),
            "the object store refuses ([Errno 22] wrong region); check the address",
        ),
        (
            botocore.exceptions.ProfileNotFound(profile="p"),
            "the object store refuses (The config profile (p)",
        ),
    ):
        with (
            pytest.raises(StorageError, match=re.escape(f"s3://b/x: {told}")),
            plain_refusals("s3://b/x"),
        ):
            raise error
    for error in (
        FileNotFoundError("x"),
        OSError(28, "disk full"),
        KeyError("x"),
        ValueError("x"),
        InputError("x"),
    ):
        with pytest.raises(type(error)) as caught, plain_refusals("s3://b/x"):
            raise error
        assert caught.value is error


WHOLE_JOB = """
import sys
from lidit.config import CodecSettings, IngestSettings, PoolSettings
from pipelines.corpus.ingest import run_ingest
from pipelines.corpus.latents import run_latents
source, corpus = sys.argv[1:]
settings = IngestSettings(resolution=32, bucket_multiple=8, unit_samples=2)
print(run_ingest([source], corpus, settings).digest)
print(run_latents(corpus, CodecSettings(), PoolSettings()).images)
assert run_ingest([source], corpus, settings).skipped
"""


@pytest.mark.slow
def test_ingest_and_latents_from_s3_to_s3(url: str, tmp_path: Path) -> None:
    file_system, root = fsspec.core.url_to_fs(url)
    (tmp_path / "shards").mkdir()
    write_tar(
        tmp_path / "shards" / "x.tar",
        [m for i in range(5) for m in sample(f"s{i}", f"c {i}", seed=i)],
    )
    file_system.put_file(str(tmp_path / "shards" / "x.tar"), f"{root}/shards/x.tar")
    results = []
    for source, corpus in (
        (f"{url}/shards", f"{url}/corpus"),
        (str(tmp_path / "shards"), str(tmp_path / "corpus")),
    ):
        done = subprocess.run(
            [sys.executable, "-c", WHOLE_JOB, source, corpus],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        results.append(done.stdout)
    assert results[0] == results[1]
    assert results[0].split()[-1] == "5"
    remote, local = (
        Corpus.open(c).latent_family("pixels") for c in (f"{url}/corpus", tmp_path / "corpus")
    )
    assert remote.digest == local.digest
    assert verify_corpus(f"{url}/corpus", deep=True).sound
