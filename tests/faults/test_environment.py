"""Crowded and narrow machines: what Ray lacks and what dies under a job is one line, Ctrl-C shows
no traceback.

Every test runs the command in a process of its own, with the very fault.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers.embed_job import make_job
from tests.helpers.tiny_models import tiny_llm
from tests.helpers.waiting import wait_until

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "jobs.main"]
PATIENCE = 240
# A namespace of its own for mounts, with a small /dev/shm: as a container has it by default.
SMALL_SHM = [
    "unshare",
    "-rm",
    "sh",
    "-c",
    'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"',
    "sh",
]


def started(command: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A command in a process group of its own, as a terminal gives it."""
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        # A shell's background jobs inherit "ignore".
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and the rest of what it wrote as errors. Workers of Ray may hold the pipe a little
    longer.
    """
    try:
        _, told = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in told, told
    return process.returncode, told


def ingest(folder: Path) -> list[str]:
    for name in ("a.jsonl", "b.jsonl"):  # a single file of captions needs no Ray
        (folder / name).write_text(f'{{"caption": "a red circle of {name}"}}\n')
    sources = ("a.jsonl", "b.jsonl")
    return [*COMMAND, "ingest", *sources, "--corpus", "corpus", "--set", "captions_only=true"]


def child_of(process: subprocess.Popen[str], name: str) -> psutil.Process | None:
    """The command's own child process of that name, once it has started."""
    try:
        return next(
            (child for child in psutil.Process(process.pid).children() if child.name() == name),
            None,
        )
    except psutil.Error:
        return None


def early_end(process: subprocess.Popen[str]) -> str | None:
    return None if process.poll() is None else f"ended with {process.returncode}"


def wait_for_child(process: subprocess.Popen[str], name: str) -> psutil.Process:
    found = wait_until(lambda: child_of(process, name), PATIENCE, lambda: early_end(process))
    assert found is not None
    return found


# -- starting --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_long_tmpdir_and_no_home_are_told_and_the_job_is_done(tmp_path: Path) -> None:
    long = tmp_path / "the-temporary-folder-of-a-job-on-a-cluster-with-long-names"
    long.mkdir()
    code, told = ended(started(ingest(tmp_path), tmp_path, TMPDIR=str(long), HOME="/proc/nowhere"))
    assert code == 0, told
    lines = [line for line in told.splitlines() if line.startswith("WARNING")]
    assert len(lines) == 2, told
    assert lines[0].startswith("WARNING: HOME=/proc/nowhere cannot be written: caches of models")
    assert lines[1].startswith(f"WARNING: TMPDIR={long} is too long for Ray's sockets")
    private = Path(lines[1].rpartition(" ")[2])
    assert private.name.startswith("ray-")
    assert not private.exists()  # removed with its end
    assert (tmp_path / "corpus" / "corpus.json").is_file()


@pytest.fixture
def taken() -> socket.socket:
    """A port that Ray is told to use and cannot."""
    held = socket.socket()
    held.bind(("", 0))
    return held


@pytest.mark.slow
def test_a_ray_that_does_not_start_is_tried_again(taken: socket.socket, tmp_path: Path) -> None:
    process = started(ingest(tmp_path), tmp_path, RAY_GCS_SERVER_PORT=str(taken.getsockname()[1]))
    assert process.stderr is not None
    for line in process.stderr:
        if "try 2 of 3" in line:
            taken.close()
            break
    code, told = ended(process)
    assert code == 0, told
    assert "try 3" not in told


def test_a_ray_that_never_starts_is_one_line(tmp_path: Path) -> None:
    # As on a machine that is too busy: Ray waits for its first process, here not at all.
    code, told = ended(started(ingest(tmp_path), tmp_path, RAY_gcs_server_port_wait_time_s="0"))
    assert code == 1
    assert [number for number in (1, 2, 3, 4) if f"try {number} of 3" in told] == [2, 3]
    last = told.splitlines()[-1]
    assert last.startswith("failed: Ray did not start in 3 tries (")
    assert "run the same command again" in last


@pytest.mark.slow
def test_a_small_shared_memory_is_told_and_the_job_is_done(tmp_path: Path) -> None:
    if (
        not shutil.which("unshare")
        or subprocess.run([*SMALL_SHM, "true"], capture_output=True).returncode
    ):
        pytest.skip("this system gives no mounts of one's own")
    code, told = ended(started([*SMALL_SHM, *ingest(tmp_path)], tmp_path))
    assert code == 0, told
    lines = [line for line in told.splitlines() if line.startswith("WARNING")]
    assert len(lines) == 1, told
    assert lines[0].startswith("WARNING: /dev/shm has 0.1 GB free, Ray's object store wants ")
    assert "--shm-size=" in lines[0]


# -- dying under a job -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("model"), "llama", layers=8)


def embed(folder: Path, model: Path, units: int) -> list[str]:
    make_job(folder / "corpus", units=units)
    (folder / "tiny.yaml").write_text(f"name: tiny\nmodel: {model}\nlayer: -1\n")
    return [*COMMAND, "embed", "corpus", "--encoder", "./tiny.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_ray_that_dies_in_mid_job_is_one_line(name: str, model: Path, tmp_path: Path) -> None:
    process = started(embed(tmp_path, model, units=400), tmp_path)
    finished = lambda: list(tmp_path.glob("corpus/text/*/0*.json"))  # noqa: E731
    wait_until(finished, PATIENCE, lambda: early_end(process))
    wait_for_child(process, name).kill()
    killed = time.monotonic()
    assert process.wait(PATIENCE) == 1
    assert time.monotonic() - killed < 20
    _, told = ended(process)
    kept = "everything finished is kept: run the same command again"
    assert (
        told.splitlines()[-1]
        == f"failed: Ray's own process {name} died (killed, or out of memory); "
        f"{kept}"
    )
    assert not list(tmp_path.glob("corpus/text/*/MANIFEST.json"))


WAITING = """
import ray
from jobs.support.abrupt import end_when_ray_dies
from pipelines.runtime.resources import connect
end_when_ray_dies()
for _ in range(2):  # an orderly end of a first Ray is no death
    ray.shutdown()
    connect()
ray.get(ray.remote(lambda: __import__("sys").stdin.read()).remote())
print("up", file=__import__("sys").stderr, flush=True)
__import__("threading").Event().wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_waiting_driver_learns_that_ray_died(name: str, tmp_path: Path) -> None:
    process = started([sys.executable, "-c", WAITING], tmp_path)
    assert process.stderr is not None
    assert next(line for line in process.stderr if line == "up\n")
    wait_for_child(process, name).kill()
    assert process.wait(20) == 1
    _, told = ended(process)
    assert told.startswith(f"failed: Ray's own process {name} died")


JOINED = """
import logging, ray
from jobs.support.abrupt import end_when_ray_dies
from pipelines.runtime.resources import connect
logging.basicConfig(level=logging.WARNING, format="%(message)s")
end_when_ray_dies()
connect()
print("up", file=__import__("sys").stderr, flush=True)
__import__("threading").Event().wait()
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, psutil.Process]]:
    """A cluster of one node, which RAY_ADDRESS names: its processes by name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    ray = str(Path(sys.executable).with_name("ray"))
    words = ["start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    subprocess.run(
        [ray, *words, "--node-ip-address=127.0.0.1"], stdout=subprocess.DEVNULL, check=True
    )
    mark = re.compile(rf"--(gcs-address=[^ ]*:|gcs_server_port=){port}")
    seen = psutil.process_iter(["cmdline"])
    processes = [
        process for process in seen if any(map(mark.fullmatch, process.info["cmdline"] or ()))
    ]
    yield {process.name(): process for process in processes}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_driver_learns_that_the_cluster_it_joined_died(
    name: str, cluster: dict[str, psutil.Process], tmp_path: Path
) -> None:
    process = started([sys.executable, "-c", JOINED], tmp_path)
    assert process.stderr is not None
    assert next(line for line in process.stderr if line == "up\n")
    cluster[name].kill()
    assert process.wait(20) == 1
    _, told = ended(process)
    if name == "raylet":
        assert told.startswith(
            "failed: Ray's own process raylet died (killed, or out of memory); everything finished"
        )
    else:
        assert "does not answer; " in told
        assert "has not answered for " in told.splitlines()[-1]
        assert told.splitlines()[-1].endswith(
            "everything finished is kept: run the same command again"
        )


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_while_ray_starts(times: int, model: Path, tmp_path: Path) -> None:
    process = started(embed(tmp_path, model, units=4), tmp_path)
    wait_for_child(process, "gcs_server")
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None
    assert next(
        line
        for line in process.stderr
        if line.startswith("interrupted: everything finished is kept")
    )
    if times == 2:  # while Ray and torch are being left
        os.killpg(process.pid, signal.SIGINT)
    code, told = ended(process)
    assert code == 130, told
    assert [line for line in told.splitlines() if "interrupted again" not in line] == []


EARLY = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "jobs.train":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["lidit", "--help"]
from jobs.entry import main
main()
"""


def test_ctrl_c_while_the_command_is_being_read(tmp_path: Path) -> None:
    code, told = ended(started([sys.executable, "-c", EARLY], tmp_path))
    assert (code, told) == (130, "interrupted: nothing was begun\n")
