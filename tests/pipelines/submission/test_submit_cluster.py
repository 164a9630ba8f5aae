"""Submitting to a real cluster: `ray start --head` on ports of its own, with a token."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
from lidit.store import Corpus
from pipelines.submission.submit import code_version
from tests.helpers.manifests import REPOSITORY
from tests.helpers.probe_project import make_project
from tests.helpers.servers import free_ports
from tests.helpers.tiny_models import tiny_llm
from tests.helpers.waiting import wait_until


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


@dataclass(frozen=True)
class Cluster:
    address: str
    env: dict[str, str]
    token: str

    def run(self, code: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Python code in a client process of its own: Ray reads the token once per process."""
        return subprocess.run(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)],
            env={**self.env, **env},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=150,
            stdin=subprocess.DEVNULL,
            check=False,
        )


PREAMBLE = """
import os, sys, time, json
from pathlib import Path
from lidit.errors import InputError, JobError
from pipelines.submission.submit import *

def go(project, address=os.environ["ADDRESS"], *overrides):
    project = Path(project)
    sys.exit(submit(Submission("probe", (str(project / "recipe.yaml"), *overrides), project), address))
"""  # noqa: E501


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("s")
    token = "a-token-of-the-test-5f3c"
    (home / "token").write_text(token)
    gcs, dashboard, client, agent, grpc, metrics = free_ports(6)
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--num-gpus=1",
        "--labels=lidit/pool=large",
        f"--temp-dir={home}/r",
        "--node-ip-address=127.0.0.1",
    ]
    command += [
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
    ]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
    command += [f"--metrics-export-port={metrics}"]
    with (home / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        log_when_dead = lambda: None if head.poll() is None else (home / "ray.log").read_text()  # noqa: E731
        wait_until(lambda: answers(dashboard), 90, log_when_dead, every=0.5)
        yield Cluster(address, {**env, "ADDRESS": address}, token)
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def runs(project: Path) -> int:
    path = project.parent / f"{project.name}-runs.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_submitting_twice_runs_once(cluster: Cluster, project: Path) -> None:
    code = f"go({str(project)!r})"
    # --address wins over a stray RAY_ADDRESS
    first = cluster.run(code, RAY_ADDRESS="203.0.113.1:6379")
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("line 0\nline 1\nline 2\n")
    assert "submitted" in first.stderr
    second = cluster.run(code)
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert "already succeeded" in second.stderr
    assert runs(project) == 1


@pytest.mark.slow
def test_a_failed_job_gives_its_exit_code_and_may_be_tried_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    project = make_project(tmp_path / "fails", exit=3)
    code = f"go({str(project)!r})"
    assert cluster.run(code).returncode == 3
    again = subprocess.run(
        [
            Path(sys.executable).with_name("lidit"),
            "submit",
            "--address",
            cluster.address,
            "probe",
            "recipe.yaml",
        ],
        env=cluster.env,
        cwd=project,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert again.returncode == 3, again.stderr
    assert again.stdout.endswith("line 2\n")
    assert "-2: submitted" in again.stderr
    assert runs(project) == 2


@pytest.mark.slow
def test_missing_and_wrong_tokens_give_one_line_without_the_token(
    cluster: Cluster, project: Path
) -> None:
    code = f"""
    try:
        go({str(project)!r})
    except InputError as error:
        print(error)
        sys.exit(2)
    """
    env = {"RAY_AUTH_TOKEN_PATH": "", "HOME": str(project)}
    missing = cluster.run(code, **env)
    assert (missing.returncode, len(missing.stdout.splitlines())) == (2, 1), missing.stderr
    assert "wants a token and there is none" in missing.stdout
    wrong = cluster.run(code, **env, RAY_AUTH_TOKEN="wrong-token")
    assert (wrong.returncode, len(wrong.stdout.splitlines())) == (2, 1), wrong.stderr
    assert "refuses this token" in wrong.stdout
    assert "wrong-token" not in wrong.stdout + wrong.stderr
    assert runs(project) == 0


@pytest.mark.slow
def test_metadata_is_there_and_the_token_is_nowhere(cluster: Cluster, project: Path) -> None:
    done = cluster.run(f"""
    project = Path({str(project)!r})
    asked = Submission("probe", (str(project / "recipe.yaml"), "a=b"), project, "corpus-1")
    client = connect(os.environ["ADDRESS"])
    name, started = start(client, asked)
    assert started and not start(client, asked)[1]
    assert follow(client, name, write=lambda text: None) == 0
    print(client.get_job_info(name).json())
    """)
    assert done.returncode == 0, done.stderr
    details = json.loads(done.stdout)
    assert details["metadata"]["lidit.corpus_digest"] == "corpus-1"
    assert details["metadata"]["git.commit"] == code_version(project)
    assert details["runtime_env"]["env_vars"]["LIDIT_GIT_COMMIT"] == code_version(project)
    assert details["entrypoint"] == "python -m jobs.probe recipe.yaml a=b"
    assert cluster.token not in done.stdout


@pytest.mark.slow
def test_ctrl_c_detaches_or_stops(cluster: Cluster, tmp_path: Path) -> None:
    project = make_project(tmp_path / "long", lines=40, pause=0.2)
    command = [sys.executable, "-c", PREAMBLE + f"go({str(project)!r})"]
    follower = subprocess.Popen(
        command,
        env=cluster.env,
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    while "line 2" not in (line := follower.stdout.readline()):
        assert line, follower.communicate()[1]
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=30)
    assert follower.returncode == 130, errors
    assert "detached, the job goes on" in errors
    assert "Traceback" not in errors
    again = cluster.run(f"go({str(project)!r})")
    assert again.returncode == 0
    assert "already running" in again.stderr
    assert "line 0\n" in again.stdout
    assert again.stdout.endswith("line 39\n")
    assert runs(project) == 1

    endless = make_project(tmp_path / "endless", lines=10000, pause=0.1)
    stopped = cluster.run(f"""
    import signal, threading
    project = Path({str(endless)!r})
    client = connect(os.environ["ADDRESS"])
    name, _ = start(client, Submission("probe", (str(project / "recipe.yaml"),), project))
    def write(text):
        if "line 3" in text:
            threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    def interrupt():
        return True
    code = follow(client, name, write, interrupt)
    print(code, client.get_job_status(name).value)
    """)
    assert stopped.stdout.strip() == "1 STOPPED", stopped.stderr


@pytest.mark.slow
def test_the_driver_gets_what_it_asks_for_and_is_never_doubled(
    cluster: Cluster, project: Path
) -> None:
    """Two such jobs at once would write into the same folders: the first one stays, and its place
    is told.
    """
    (project / "jobs" / "where_here.py").write_text(
        "import os, time\n"
        "print('gpus', os.environ.get('CUDA_VISIBLE_DEVICES') or 'none', flush=True)\n"
        "time.sleep(20)  # the job's work: it must still run when the second one is sent\n"
    )

    def send(*words: str) -> subprocess.Popen[str]:
        command = [
            Path(sys.executable).with_name("lidit"),
            "submit",
            "--address",
            cluster.address,
            *words,
        ]
        return subprocess.Popen(
            command, env=cluster.env, cwd=project, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    first = send("--gpus", "1", "--node-label", "lidit/pool=large", "where-here")
    assert first.stdout is not None
    while not (line := first.stdout.readline()).startswith("gpus"):
        assert line, first.communicate()[1]
    assert line == "gpus 0\n"
    second_out, second_err = send("--cpus", "1", "where-here").communicate(timeout=120)
    _, first_err = first.communicate(timeout=120)
    assert "gpus 0\n" in second_out, second_err
    assert "already running, following" in second_err
    assert "its driver asked for gpus 1, lidit/pool=large; to ask for cpus 1, stop it" in second_err
    assert first_err.rstrip().endswith("succeeded")
    unasked, _ = send("where-here", "again").communicate(timeout=120)
    assert "gpus none" in unasked


@pytest.mark.slow
def test_a_folder_too_large_is_one_line(cluster: Cluster, project: Path) -> None:
    (project / "big.bin").write_bytes(os.urandom(110 << 20))
    command = [
        Path(sys.executable).with_name("lidit"),
        "submit",
        "--address",
        cluster.address,
        "probe",
        "recipe.yaml",
    ]
    for code, told in ((2, "too large to be sent to the cluster"), (0, "succeeded")):
        done = subprocess.run(
            command, env=cluster.env, cwd=project, capture_output=True, text=True, timeout=150
        )
        assert (done.returncode, told in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
        (project / ".gitignore").write_text("/big.bin\n")


class CuttingProxy:
    """A TCP proxy on loopback that drops every connection after it has lived a while, as a bad
    tunnel would.
    """

    def __init__(self, target: int, lifetime: float) -> None:
        self.target, self.lifetime, self.cuts = target, lifetime, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()
            threading.Timer(self.lifetime, self._cut, [near, far]).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _cut(self, near: socket.socket, far: socket.socket) -> None:
        self.cuts += 1
        for each in (near, far):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.mark.slow
def test_the_log_is_followed_across_broken_connections(cluster: Cluster, tmp_path: Path) -> None:
    project = make_project(tmp_path / "cut", lines=60, pause=0.25)
    proxy = CuttingProxy(int(cluster.address.rsplit(":", 1)[1]), lifetime=4.0)
    done = cluster.run(f"go({str(project)!r})", ADDRESS=f"http://127.0.0.1:{proxy.port}")
    proxy.server.close()
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("line ")]
    assert lines == [f"line {i}" for i in range(60)]
    assert proxy.cuts >= 3


RECIPE = """
name: sent
output: {work}/runs
corpus: {work}/corpus
encoders: [tiny.yaml]
model: {{width: 32, depth: 1, heads: 2, patch_size: 8, refiner: {{depth: 1}}}}
objective: {{kind: clean, timesteps: uniform}}
train: {{steps: 4, batch_size: 8, checkpoint_every: 2, log_every: 2}}
sampler: {{steps: 2}}
engine: {{workers: 1}}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_work_is_submitted_job_by_job(cluster: Cluster, tmp_path: Path) -> None:
    """With our command and with Ray's own, from a folder that holds the code and the recipe."""
    project, work = tmp_path / "project", tmp_path / "work"
    for package in ("lidit", "pipelines", "jobs"):
        shutil.copytree(
            REPOSITORY / package, project / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    (project / "recipe.yaml").write_text(RECIPE.format(work=work))
    (project / "tiny.yaml").write_text(f"name: tiny\nmodel: {tiny_llm(work / 'llama', 'llama')}\n")
    write_scene_shards(work / "scenes", SceneSet(60, 32, seed=3))
    env = {**cluster.env, "RAY_AUTH_TOKEN": cluster.token}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=project, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
        return done.stdout + done.stderr

    def send(*words: str | Path) -> str:
        return run("lidit", "submit", "--address", cluster.address, *words)

    corpus, model, pictures = work / "corpus", work / "runs/sent/model", work / "pictures"
    send(
        "ingest",
        work / "scenes",
        "--corpus",
        corpus,
        "--set",
        "resolution=32",
        "--set",
        "bucket_multiple=8",
    )
    send("embed", corpus, "--encoder", "tiny.yaml")
    send("latents", corpus, "--codec", "pixels")
    trained = send("train", "recipe.yaml")
    name = next(word.rstrip(":") for word in trained.split() if word.startswith("lidit-train-"))
    assert "succeeded, following" in send("train", "recipe.yaml")
    details = json.loads(
        cluster.run(f"print(connect(os.environ['ADDRESS']).get_job_info({name!r}).json())").stdout
    )
    assert details["metadata"]["lidit.corpus_digest"] == Corpus.open(corpus).digest
    drawing = [
        "python",
        "-m",
        "jobs.sample",
        str(model),
        "--prompt",
        "'a red circle'",
        "--out",
        str(pictures),
    ]
    run("ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--", *drawing)
    assert Image.open(pictures / "grid.png").width > 32
    assert len(list(pictures.glob("000-*.png"))) == 4
