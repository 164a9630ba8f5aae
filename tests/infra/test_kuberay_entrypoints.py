"""The commands of the RayJobs, led through every shell that stands between the manifest and our
jobs.

KubeRay (ray-operator/controllers/ray/common/job.go) pastes `entrypoint` unquoted into the command
of bash in the submitter pod; that pod has neither settings nor recipe. Ray's CLI joins the words
again, and sh in a pod of the cluster, which has the settings, runs the line.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from infra.kuberay.documents import pod_templates
from infra.kuberay.together import entrypoint_errors
from jobs.main import app
from lidit.config import Recipe
from lidit.config.settings import apply_overrides, validate
from tests.helpers.manifests import find

JOBS = ("lidit-embed-large", "lidit-embed-small", "lidit-train")
# Stands for a program: writes what it was called with; `ray job status` knows no job yet.
STAND_IN = """#!{python} -S
import json, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
sys.exit(sys.argv[1:3] == ["job", "status"])
"""


class Machine:
    """A pod with stand-ins for some programs, nothing else on its PATH, and the calls they got."""

    def __init__(self, folder: Path, programs: tuple[str, ...]) -> None:
        folder.mkdir()
        self.calls, self.path = folder / "calls", folder / "bin"
        self.path.mkdir()
        self.calls.write_text("")
        for name in programs:
            (self.path / name).write_text(
                STAND_IN.format(python=sys.executable, calls=str(self.calls))
            )
            (self.path / name).chmod(0o755)

    def run(self, command: list[str], env: dict[str, str]) -> list[list[str]]:
        """The calls, each with the program's name first."""
        subprocess.run(command, env={**env, "PATH": str(self.path)}, check=True, timeout=60)
        calls = [json.loads(line) for line in self.calls.read_text().splitlines()]
        return [[Path(program).name, *words] for program, *words in calls]


def submitter_line(job: dict[str, Any]) -> str:
    """What KubeRay gives to `bash -ce --` in the submitter pod (its wait for the dashboard left
    out).
    """
    address, name = "http://head-svc:8265", "lidit-x7k2p"
    return (
        f"if ! ray job status --address {address} {name} >/dev/null 2>&1 ; then ray job submit "
        f"--address {address} "
        f"--no-wait --submission-id {name} --entrypoint-num-cpus "
        f"{job['spec']['entrypointNumCpus']:f} "
        f"-- {job['spec']['entrypoint'].strip()} ; fi ; ray job logs --address {address} "
        f"--follow {name}"
    )


def plain(template: dict[str, Any], maps: dict[str, Any]) -> dict[str, str]:
    """The variables of a pod that are in no Secret."""
    container = template["spec"]["containers"][0]
    own = {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
    shared = [maps[entry["configMapRef"]["name"]] for entry in container.get("envFrom", [])]
    return {key: value for settings in [*shared, own] for key, value in settings.items()}


def arrives(documents: list[dict[str, Any]], job: dict[str, Any], folder: Path) -> list[list[str]]:
    """Every program that runs in the job's pod, as the words it gets."""
    from ray.dashboard.modules.job.cli import list2cmdline, submit

    pods = dict(pod_templates(job))
    maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
    pod = Machine(folder / "submitter", ("ray", "python"))
    calls = pod.run(
        [shutil.which("bash") or "bash", "-ce", "--", submitter_line(job)],
        plain(pods["submitter"], maps),
    )
    assert [call[:3] for call in calls] == [
        ["ray", "job", verb] for verb in ("status", "submit", "logs")
    ], calls
    sent = submit.make_context("submit", calls[1][3:]).params["entrypoint"]
    driver = Machine(folder / "driver", ("python",))
    return driver.run(
        [shutil.which("sh") or "sh", "-c", list2cmdline(sent)], plain(pods["head"], maps)
    )


@pytest.mark.parametrize("name", JOBS)
def test_the_command_arrives_as_our_jobs_read_it(
    documents: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    settings = find(documents, "ConfigMap", "lidit-settings")["data"]
    job = find(documents, "RayJob", name)
    groups = {
        group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }
    ((_, dash, module, *words),) = arrives(documents, job, tmp_path)
    assert dash == "-m"
    command = get_command(app).commands[module.removeprefix("jobs.")]  # type: ignore[attr-defined]
    parsed = command.make_context(module, list(words)).params
    if name == "lidit-train":
        given = {"name": "r", "encoders": [{"name": "e", "model": "m"}], "corpus": "of the recipe"}
        tree = apply_overrides(given, parsed["overrides"])
        assert parsed["recipe"] == "/etc/lidit/recipe.yaml"
        assert tree["corpus"] == settings["LIDIT_CORPUS"]
        assert validate(Recipe, tree, name).run_folder == Path("/runs/r")
        assert tree["engine"]["label_selector"] == groups["train"]["labels"]
        return
    size = name.removeprefix("lidit-embed-")
    pool = groups[f"encode-{size}"]
    limits = pool["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert parsed["corpus"] == settings["LIDIT_CORPUS"]
    assert parsed["encoder"] == [f"/etc/lidit/{size}.yaml"]
    assert dict(label.split("=") for label in parsed["node_label"]) == pool["labels"]
    assert parsed["actors"] == pool["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert parsed["gpus"] == 1


# What a job's author may write, what runs in the job's pod (None: not that, if anything), what the
# check says.
TRIED: list[tuple[str, list[str] | None, str]] = [
    ("python -m j '$LIDIT_CORPUS' '{a: b}'", ["-m", "j", "s3://lidit/corpus", "{a: b}"], ""),
    (
        "python -m j 'corpus=$LIDIT_CORPUS and $LIDIT_RUNS'",
        ["-m", "j", "corpus=s3://lidit/corpus and /runs"],
        "",
    ),
    (r"python -m j \$LIDIT_RUNS", ["-m", "j", "/runs"], ""),
    (
        "python -m j $LIDIT_CORPUS",
        None,
        "'$' outside single quotes is expanded in the submitter pod",
    ),
    ('python -m j "corpus=$LIDIT_CORPUS"', None, "'$' outside single quotes"),
    (
        "python -m j '$LIDIT_CORPUS' & python -m k",
        None,
        "'&' outside quotes ends the command in the submitter pod",
    ),
    ("python -m j; python -m k", None, "';' outside quotes"),
    ("python -m j '\"$LIDIT_RUNS\"'", ["-m", "j", '"/runs"'], ""),
    (r"python -m j 'a\b'", None, "would read"),
    ('python -m j "it\'s"', None, "left open in the job's pod"),
    ("python -m j 'it;s'", None, "';' outside quotes ends the command in the job's pod"),
    ("python -m j '$LIDIT_NONE'", None, "LIDIT_NONE: in no ConfigMap of the job's pods"),
    ("python -m j '$LIDIT_SPACE'", None, "would not take this value as one word"),
    ("python -m j '$?'", None, "something else than a variable's name"),
    ("python -m j 'a", None, "left open"),
    (" ", None, "there is no command"),
]


@pytest.mark.parametrize(("entrypoint", "expected", "message"), TRIED)
def test_the_check_says_what_the_shells_would_do(
    small: list[dict[str, Any]],
    entrypoint: str,
    expected: list[str] | None,
    message: str,
    tmp_path: Path,
) -> None:
    find(small, "ConfigMap", "lidit-settings")["data"]["LIDIT_SPACE"] = "two words"
    job = copy.deepcopy(find(small, "RayJob", "lidit-train"))
    job["spec"]["entrypoint"] = entrypoint
    errors = list(entrypoint_errors([job, *[d for d in small if d["kind"] == "ConfigMap"]]))
    if expected is None:
        assert any(
            error.startswith("RayJob/lidit-train: entrypoint: ") and message in error
            for error in errors
        ), errors
    else:
        assert errors == []
        assert arrives(small, job, tmp_path) == [["python", *expected]]
