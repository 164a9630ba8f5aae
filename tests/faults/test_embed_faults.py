"""Whatever dies or fills up while a corpus is embedded: the same command finishes it, redoes
nothing that was done, and leaves the same bytes as an undisturbed run.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lidit.config import PoolSettings
from lidit.errors import InputError, JobError
from lidit.store import CRASH_POINTS, Corpus
from pipelines.corpus.embed import run_embed
from tests.helpers.embed_job import contents, embed_here, encoder, finished, make_job, start
from tests.helpers.tiny_models import tiny_llm
from tests.helpers.waiting import wait_until

UNITS, ROWS = 12, 60
ONE = PoolSettings(actors=1, cpus=1)
POINTS = list(CRASH_POINTS)
ONCE = ("family-created", "shared-written", "table-published", "manifest-published")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("model"), "llama", layers=8)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, ray_cluster: None) -> Path:
    """Without a cluster: what the disturbed runs on one end with must be the same bytes."""
    corpus = make_job(tmp_path_factory.mktemp("undisturbed") / "corpus", UNITS, ROWS)
    embed_here(corpus, encoder(model))
    return corpus


@pytest.fixture(scope="module")
def small_reference(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    corpus = make_job(tmp_path_factory.mktemp("reference") / "corpus")
    embed_here(corpus, encoder(model))
    return corpus


def rerun_and_compare(corpus: Path, model: Path, undisturbed: Path) -> None:
    """The rerun computes exactly what was missing and ends with the undisturbed run's bytes."""
    before = finished(corpus)
    summary = run_embed(str(corpus), encoder(model), ONE)
    assert summary.computed_units == summary.units - len(before)
    assert {name: written for name, written in finished(corpus).items() if name in before} == before
    assert contents(corpus) == contents(undisturbed)
    digests = {Corpus.open(path).text_family("tiny").digest for path in (corpus, undisturbed)}
    assert len(digests) == 1
    assert not list(corpus.rglob(".tmp-*"))


def encoder_actors(parent: int) -> list[psutil.Process]:
    """The encoder actors among the descendants of a driver."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if "EncodeUnits" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    # units of tiny models follow each other within milliseconds
    wait_until(condition, seconds, every=0.002)


def test_kill_of_an_actor_is_survived(undisturbed: Path, model: Path, tmp_path: Path) -> None:
    corpus = make_job(tmp_path / "corpus", UNITS, ROWS)
    killed: list[int] = []
    records: dict[str, int] = {}

    def kill() -> None:
        wait_for(lambda: finished(corpus))
        for process in encoder_actors(os.getpid()):
            process.kill()
            killed.append(process.pid)
        records.update(finished(corpus))

    thread = threading.Thread(target=kill)
    thread.start()
    summary = run_embed(str(corpus), encoder(model), ONE)
    thread.join()
    assert killed
    assert 0 < len(records) < UNITS, "the actor was to die in the middle"
    assert summary.units == UNITS
    assert {
        name: written for name, written in finished(corpus).items() if name in records
    } == records
    assert contents(corpus) == contents(undisturbed)


@pytest.mark.parametrize(
    "kind", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_the_same_command_goes_on_after_the_driver_died(
    kind: signal.Signals, undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    corpus = make_job(tmp_path / "corpus", UNITS, ROWS)
    process, workers = start(corpus, encoder(model)), []
    try:
        wait_for(lambda: finished(corpus) or process.poll() is not None)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(kind)
        process.wait(timeout=60)
        assert process.returncode != 0
        assert 0 < len(finished(corpus)) < UNITS, "the driver was to die in the middle"
        with pytest.raises(InputError, match="incomplete"):
            Corpus.open(corpus).text_family("tiny")
    finally:
        end_group(process)
        end_all(workers)  # an actor outlives its driver long enough to publish one more unit
    rerun_and_compare(corpus, model, undisturbed)


def end_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=60)


def end_group(process: subprocess.Popen[str]) -> None:
    """What is left of a driver's own cluster."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("point", POINTS)
def test_kill_at_every_point_of_the_publish_protocol(
    point: str, small_reference: Path, model: Path, tmp_path: Path
) -> None:
    corpus = make_job(tmp_path / "corpus")

    def job() -> None:
        os.environ["LIDIT_CRASH_AT"] = point if point in ONCE else f"{point}:3"
        embed_here(corpus, encoder(model))

    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [handle.complete for handle in Corpus.open(corpus).text_families()] == [
        point == "manifest-published"
    ]
    before = finished(corpus)
    computed = embed_here(corpus, encoder(model))
    assert computed == [unit for unit in range(6) if f"{unit:05d}.json" not in before]
    assert {name: written for name, written in finished(corpus).items() if name in before} == before
    assert contents(corpus) == contents(small_reference)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "point", ["shared-written", "data-renamed", "record-written", "table-published"]
)
def test_kill_at_a_point_under_ray(
    point: str, undisturbed: Path, model: Path, tmp_path: Path
) -> None:
    """In an actor, which dies in each of its lives until Ray gives up, or once; or
    in the driver.
    """
    corpus = make_job(tmp_path / "corpus", UNITS, ROWS)
    process = start(corpus, encoder(model), LIDIT_CRASH_AT=point)
    try:
        process.communicate(timeout=300)
        # the actor's second life finds the shared states published
        survived = point == "shared-written"
        assert (process.returncode == 0) == survived
    finally:
        end_group(process)
    assert [handle.complete for handle in Corpus.open(corpus).text_families()] == [survived]
    rerun_and_compare(corpus, model, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_loses_nothing(
    undisturbed: Path, model: Path, small_disk: Path
) -> None:
    corpus = make_job(small_disk / "corpus", UNITS, ROWS)
    with pytest.raises(JobError, match="No space left on device; finished units are safe"):
        run_embed(str(corpus), encoder(model, storage="float32"), ONE)
    before = finished(corpus)
    assert 0 < len(before) < UNITS
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    summary = run_embed(str(corpus), encoder(model, storage="float32"), ONE)
    assert summary.computed_units == UNITS - len(before)
    assert not list(corpus.rglob(".tmp-*")), (
        "what the unit in flight had written was to be cleaned up"
    )
    family = Corpus.open(corpus).text_family("tiny")
    for unit in range(UNITS):
        family.verify_unit(unit)
