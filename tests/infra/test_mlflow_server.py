"""The MLflow manifests, and the real server with the very flags they give it, on sqlite and on
PostgreSQL.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.kuberay.documents import pod_templates
from infra.kuberay.validate import check, load_schemas, security_errors
from tests.helpers.manifests import REPOSITORY, Network, find, render
from tests.helpers.servers import free_ports, healthy
from tests.helpers.waiting import wait_until

MLFLOW = REPOSITORY / "infra" / "mlflow"
ADMIN_PASSWORD = "a-long-password-of-the-test"


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return render(MLFLOW)


def container(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return find(documents, "Deployment", "lidit-mlflow")["spec"]["template"]["spec"]["containers"][
        0
    ]


def test_manifests_pass_schema_and_security(
    documents: list[dict[str, Any]], shared_data: Path
) -> None:
    if not (shared_data / "kuberay").is_dir():
        pytest.skip("no KubeRay CRD schemas beside this checkout")
    schemas = load_schemas(shared_data / "kuberay")
    assert [error for document in documents for error in check(document, schemas)] == []
    assert sum(len(list(pod_templates(document))) for document in documents) == 2


def test_the_page_names_what_a_team_has_to_change(documents: list[dict[str, Any]]) -> None:
    page = (REPOSITORY / "docs" / "mlflow-server.md").read_text()
    server = container(documents)
    (endpoint,) = [entry for entry in server["env"] if "example.com" in entry.get("value", "")]
    (bucket,) = [arg.partition("=")[2] for arg in server["args"] if "s3://" in arg]
    assert f"`{endpoint['name']}`" in page
    assert f"`{bucket}`" in page


def test_a_password_in_the_manifest_is_found(documents: list[dict[str, Any]]) -> None:
    deployment = find(render(MLFLOW), "Deployment", "lidit-mlflow")
    for entry in container([deployment])["env"]:
        if entry["name"] == "PGPASSWORD":
            entry.pop("valueFrom")
            entry["value"] = "hunter2"
    assert any(
        "PGPASSWORD must come from a Secret" in error for error in security_errors(deployment)
    )


def test_flags_and_environment(documents: list[dict[str, Any]]) -> None:
    server = container(documents)
    assert {
        "--app-name=basic-auth",
        "--serve-artifacts",
        "--artifacts-destination=s3://lidit-mlflow",
    } <= set(server["args"])
    values = {entry["name"]: entry.get("value") for entry in server["env"]}
    assert values["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "False"
    assert find(documents, "Service", "lidit-mlflow")["spec"]["type"] == "ClusterIP"
    backend = next(arg for arg in server["args"] if arg.startswith("--backend-store-uri="))
    assert "@" not in backend  # user and password come from the environment


def test_who_reaches_the_server_and_the_database(documents: list[dict[str, Any]]) -> None:
    network = Network(documents)
    server, database = {"lidit/role": "mlflow"}, {"lidit/role": "postgres"}
    ray = {"lidit/job": "train", "ray.io/node-type": "worker"}
    assert network.allows(ray, server, 5000, "lidit", "lidit-mlflow")
    assert network.allows(server, database, 5432, "lidit-mlflow", "lidit-mlflow")
    assert not network.allows({"app": "x"}, server, 5000, "lidit", "lidit-mlflow")
    assert not network.allows(ray, server, 5000, "default", "lidit-mlflow")
    assert not network.allows(ray, database, 5432, "lidit", "lidit-mlflow")
    assert not network.allows({"app": "x"}, database, 5432, "lidit-mlflow", "lidit-mlflow")


@contextlib.contextmanager
def running_server(
    documents: list[dict[str, Any]],
    folder: Path,
    backend: str,
    auth_database: str,
    extra_env: dict[str, str],
) -> Iterator[str]:
    """The Deployment's own command line and environment, on loopback, with other stores."""
    server, (port,) = container(documents), free_ports(1)
    ini = find(documents, "ConfigMap", "mlflow-auth")["data"]["auth.ini"]
    (folder / "auth.ini").write_text(
        "\n".join(
            f"database_uri = {auth_database}" if line.startswith("database_uri") else line
            for line in ini.splitlines()
        )
    )
    replaced = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": backend,
        "--artifacts-destination": str(folder / "artifacts"),
    }
    flags = [arg.split("=", 1) for arg in server["args"]]
    assert set(replaced) <= {flag[0] for flag in flags}
    arguments = [
        flag[0] if len(flag) == 1 else f"{flag[0]}={replaced.get(flag[0], flag[1])}"
        for flag in flags
    ]
    env = os.environ | {
        e["name"]: e["value"]
        for e in server["env"]
        if "value" in e and e["name"].startswith("MLFLOW")
    }
    env |= {
        "HOME": str(folder),
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-secret-key-of-the-test",
        **extra_env,
    }
    program = Path(sys.executable).with_name("mlflow")
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [str(program), *server["command"][1:], *arguments],
            env=env,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        ended, told = process.poll, (folder / "server.log").read_text
        log_when_dead = lambda: None if ended() is None else told()  # noqa: E731
        wait_until(lambda: healthy(url), 120, log_when_dead, every=0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


CLIENT = """
import sys
from pathlib import Path
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
experiment = client.create_experiment("lidit")
run = client.create_run(experiment, run_name="r")
client.log_param(run.info.run_id, "train.lr", "1e-4")
for step in range(3):
    client.log_metric(run.info.run_id, "loss", 1.0 / (step + 1), step=step)
Path("grid.txt").write_text("pixels")
client.log_artifact(run.info.run_id, "grid.txt")
client.set_terminated(run.info.run_id)
read = client.get_run(run.info.run_id)
assert read.info.status == "FINISHED" and read.data.params == {"train.lr": "1e-4"}, read
assert [m.value for m in client.get_metric_history(run.info.run_id, "loss")] == [1.0, 0.5, 1.0 / 3]
assert read.info.artifact_uri.startswith("mlflow-artifacts:"), read.info.artifact_uri
got = client.download_artifacts(run.info.run_id, "grid.txt", "/".join([str(Path.cwd()), "back"]))
assert Path(got).read_text() == "pixels"
model = client.create_registered_model("lidit")
version = client.create_model_version("lidit", f"runs:/{run.info.run_id}", run_id=run.info.run_id)
client.set_registered_model_alias("lidit", "newest", version.version)
assert client.get_model_version_by_alias("lidit", "newest").run_id == run.info.run_id
print(run.info.run_id)
"""


def log_a_run(url: str, folder: Path, password: str | None) -> subprocess.CompletedProcess[str]:
    client = folder / "client"
    (client / "back").mkdir(parents=True, exist_ok=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_TRACKING")}
    env |= {"HOME": str(client), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    if password:
        env |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
    return subprocess.run(
        [sys.executable, "-c", CLIENT, url],
        env=env,
        cwd=client,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def check_server(url: str, folder: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", timeout=10)
    assert refused.value.code == 401
    strange = urllib.request.Request(
        f"{url}/api/2.0/mlflow/experiments/search", headers={"Host": "evil.example.com"}
    )
    with pytest.raises(urllib.error.HTTPError) as rebound:
        urllib.request.urlopen(strange, timeout=10)
    assert rebound.value.code in (401, 403)
    wrong = log_a_run(url, folder, "not-the-password")
    assert wrong.returncode != 0
    assert "401" in wrong.stderr
    done = log_a_run(url, folder, ADMIN_PASSWORD)
    assert done.returncode == 0, done.stderr[-3000:] + (folder / "server.log").read_text()[-3000:]
    run = done.stdout.split()[-1]
    stored = [path for path in (folder / "artifacts").rglob("grid.txt") if run in path.parts]
    assert len(stored) == 1, "the artifact went through the server into its own store"
    assert ADMIN_PASSWORD not in (folder / "server.log").read_text()


@pytest.mark.slow
def test_the_real_server_on_sqlite(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    backend, auth = f"sqlite:///{tmp_path}/mlflow.db", f"sqlite:///{tmp_path}/auth.db"
    with running_server(documents, tmp_path, backend, auth, {}) as url:
        check_server(url, tmp_path)


@pytest.fixture
def postgres(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A PostgreSQL of our own with a password login, on a free loopback port."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [
        Path(p).parent for p in [shutil.which("initdb")] if p
    ]
    if not programs:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    as_owner = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(
        subprocess.run(
            [*as_owner, "mktemp", "-d"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    (port,) = free_ports(1)

    def run(program: str, *words: str, text: str | None = None) -> None:
        subprocess.run(
            [*as_owner, str(programs[-1] / program), *words],
            cwd="/",
            input=text,
            text=True,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    run(
        "initdb",
        "-D",
        str(folder / "data"),
        "--auth-host=scram-sha-256",
        "--auth-local=trust",
        "-U",
        "owner",
    )
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
    run(
        "pg_ctl",
        "-D",
        str(folder / "data"),
        "-w",
        "-l",
        str(folder / "log"),
        "-o",
        options,
        "start",
    )
    try:
        sql = find(render(MLFLOW), "ConfigMap", "postgres-init")["data"]["databases.sql"]
        setup = (
            f"CREATE USER mlflow PASSWORD '{ADMIN_PASSWORD}'; CREATE DATABASE mlflow OWNER mlflow;"
        )
        for statement in f"{setup} {sql}".split(";"):
            if statement.strip():
                run(
                    "psql",
                    "-h",
                    str(folder),
                    "-p",
                    str(port),
                    "-U",
                    "owner",
                    "-d",
                    "postgres",
                    "-c",
                    statement,
                )
        yield port
    finally:
        run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")
        subprocess.run([*as_owner, "rm", "-rf", str(folder)], check=False)


@pytest.mark.slow
def test_the_real_server_on_postgresql(
    documents: list[dict[str, Any]], tmp_path: Path, postgres: int
) -> None:
    backend = next(
        a.split("=", 1)[1]
        for a in container(documents)["args"]
        if a.startswith("--backend-store-uri")
    )
    here = f"127.0.0.1:{postgres}"
    auth = find(documents, "ConfigMap", "mlflow-auth")["data"]["auth.ini"]
    auth = next(
        line.split(" = ")[1] for line in auth.splitlines() if line.startswith("database_uri")
    )
    env = {"PGUSER": "mlflow", "PGPASSWORD": ADMIN_PASSWORD}
    urls = [url.replace("lidit-postgres:5432", here) for url in (backend, auth)]
    assert all(here in url for url in urls)
    with running_server(documents, tmp_path, *urls, env) as url:
        check_server(url, tmp_path)
