"""Where a run comes from, in MLflow's own fields: user, command, commit; and what it ran on."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from lidit.commit import git_state
from lidit.config.passwords import has_password
from lidit.errors import plain

USER, SOURCE, SOURCE_TYPE = "mlflow.user", "mlflow.source.name", "mlflow.source.type"
COMMIT, DESCRIPTION, PARENT = (
    "mlflow.source.git.commit",
    "mlflow.note.content",
    "mlflow.parentRunId",
)


def origin_tags() -> dict[str, str]:
    """Tags that fill MLflow's columns User, Source and Version."""
    state = git_state()
    tags = {SOURCE: command_line(sys.argv), SOURCE_TYPE: "LOCAL", **state}
    if user := _user():
        tags[USER] = user
    if "git.commit" in state:
        tags[COMMIT] = state["git.commit"]
    return tags


def command_line(words: list[str]) -> str:
    """The command as a person would type it again; words that hold a password are left out."""
    program = Path(words[0]) if words else Path("python")
    # `python -m jobs.train` is `lidit train`.
    began = (
        ["lidit", program.stem.replace("_", "-")]
        if program.parent.name == "jobs"
        else [program.name]
    )
    shown = ["..." if has_password(word) else word for word in words[1:]]
    return plain(shlex.join([*began, *shown]))


def _user() -> str:
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return ""


def write_environment(folder: Path, cluster: Mapping[str, float]) -> Path:
    """Write requirements.txt, every installed distribution, and hardware.json into `folder`.

    cluster: what Ray offers in all; the rest is this machine's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {f"{each.name}=={each.version}" for each in distributions() if each.name}
    (folder / "requirements.txt").write_text("\n".join(sorted(found, key=str.lower)) + "\n")
    (folder / "hardware.json").write_text(
        json.dumps({**hardware(), "cluster": dict(cluster)}, indent=1) + "\n"
    )
    return folder


def hardware() -> dict[str, Any]:
    """This machine: system, processors, memory, GPUs, and the CUDA that torch was built for."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "memory_gigabytes": round(memory / 1e9, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }
