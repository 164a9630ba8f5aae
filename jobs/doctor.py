"""`lidit doctor`: what of this machine lidit will meet, one line each, with what to do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jobs.support.start import run
from lidit.errors import InputError, JobError, one_line, plain

if TYPE_CHECKING:
    from pipelines.runtime.network import NetworkProbe

PYTHON = (3, 11)
LEAST_DISK, LEAST_MEMORY = 20e9, 2e9  # bytes; a demo's, and what Ray's object store needs
# bytes/s of an all-reduce below which something is not as it should be, bytes of locked memory
LEAST_IN_MACHINE, LEAST_BETWEEN_MACHINES, LEAST_LOCKED = 50e9, 10e9, 2**30
MODEL_1B_BYTES = 2.2e9  # LI-DiT-1B's gradients in bfloat16
PACKAGES = ("torch", "transformers", "diffusers", "pyarrow")
CLUSTER_PACKAGES = ("ray", "deepspeed", "mlflow")  # of the extra cluster
MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True)
class Finding:
    """bad: jobs will fail; note: some job will, or is slow."""

    state: Literal["ok", "note", "bad"]
    what: str
    found: str
    remedy: str = ""


def command(
    place: Annotated[
        list[str] | None, typer.Option(help="An s3:// or other address to try; repeat for more.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray/--no-ray", help="Start an embedded Ray, as jobs do.")
    ] = True,
    nccl: Annotated[
        bool, typer.Option("--nccl", help="Time a sum over all free GPUs of the cluster.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list instead of lines.")] = False,
) -> None:
    """Try what jobs need of this machine: Python, libraries, GPUs, Ray, memory, disk, object
    stores, MLflow, encoders.

    Exit code 1 when anything is bad. **Reads** nothing of yours, but the addresses given.
    **Writes** nothing; starts Ray for a moment, and with `--nccl` a process on every free GPU.

    **Example:** `lidit doctor --place s3://bucket/corpus`
    """
    checks: list[Callable[[], Finding]] = [
        python,
        libraries,
        gpus,
        shared_memory,
        disk,
        tracker,
        encoders,
    ]
    checks += [partial(store, address) for address in place or ()]
    checks += [starting_ray] if ray or nccl else []
    checks += [network] if nccl else []
    found = []
    for check in checks:
        found.append(check())
        if not as_json:
            print(shown(found[-1]), flush=True)
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    if bad := [one.what for one in found if one.state == "bad"]:
        raise JobError(f"lidit doctor: {', '.join(bad)}: see above")


def shown(finding: Finding) -> str:
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    return f"{MARKS[finding.state]}  {finding.what:<13} {plain(finding.found + remedy)}"


def python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < PYTHON:
        return Finding("bad", "python", found, "3.11 or newer is needed")
    return Finding("ok", "python", found)


def libraries() -> Finding:
    from importlib.metadata import PackageNotFoundError, version  # slow: not for every help

    found, missing = [], []
    for name in (*PACKAGES, *CLUSTER_PACKAGES):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if any(name in PACKAGES for name in missing):
        return Finding(
            "bad", "libraries", f"{', '.join(missing)} not installed", "pip install lidit-pipeline"
        )
    if missing:
        remedy = "pip install 'lidit-pipeline[cluster]' to train, track and use Ray"
        return Finding(
            "note", "libraries", f"{', '.join(found)}; {', '.join(missing)} not installed", remedy
        )
    return Finding("ok", "libraries", ", ".join(found))


def gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        remedy = (
            "check the driver (nvidia-smi)"
            if built
            else "this torch is built for the CPU; jobs run there, slowly"
        )
        return Finding("note", "gpus", "none", remedy)
    names = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
    listed = ", ".join(f"{one.name} with {one.total_memory / 1e9:.0f} GB" for one in names)
    return Finding("ok", "gpus", f"{listed}; CUDA {torch.version.cuda}")


def shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free
    found = f"{free / 1e9:.1f} GB free in /dev/shm"
    if free < LEAST_MEMORY:
        return Finding(
            "note",
            "shared memory",
            found,
            "Ray goes to the disk instead; docker run --shm-size=8g gives more",
        )
    return Finding("ok", "shared memory", found)


def disk() -> Finding:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{free / 1e9:.0f} GB free in {here}"
    if not os.access(here, os.W_OK):
        return Finding("note", "disk", f"{here} cannot be written", "give jobs paths elsewhere")
    if free < LEAST_DISK:
        return Finding(
            "note", "disk", found, "states take 8 KB per token at width 4,096: see lidit plan"
        )
    return Finding("ok", "disk", found)


def store(address: str) -> Finding:
    from lidit.store.files.folder import Folder

    try:
        count = len(Folder.at(address).sizes())
    except (InputError, OSError, ImportError) as error:
        return Finding(
            "bad", "store", one_line(error, 300).removeprefix(f"{address}: "), f"tried {address}"
        )
    return Finding("ok", "store", f"{address}: {count} files")


def tracker() -> Finding:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        return Finding(
            "ok", "mlflow", "no MLFLOW_TRACKING_URI: runs go to mlflow.db in a training's output"
        )
    from pipelines.tracking import check_experiment, store_uri

    try:
        clean = store_uri(uri, Path())
        if clean.startswith("http"):
            return _answers(clean)
        check_experiment(clean, "lidit")
    except InputError as error:
        return Finding("bad", "mlflow", str(error))
    return Finding("ok", "mlflow", clean)


def _answers(uri: str) -> Finding:
    import requests

    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=5)
    except requests.RequestException as error:
        return Finding(
            "bad",
            "mlflow",
            f"{uri} does not answer ({type(error).__name__})",
            "start it, or check the address",
        )
    if not answer.ok:
        return Finding(
            "bad",
            "mlflow",
            f"{uri} answers {answer.status_code}",
            "check the address and the login",
        )
    return Finding("ok", "mlflow", f"{uri} answers")


def encoders() -> Finding:
    from lidit.config.shipped import ENCODERS, load_encoder_settings

    names = sorted(path.stem for path in ENCODERS.glob("*.yaml"))
    settings = {name: load_encoder_settings(name) for name in names}
    # A hub id without a commit is refused by every job, also where the hub's newest is at hand.
    unpinned = {name for name, one in settings.items() if needs_commit(one.model, one.revision)}
    usable = [name for name in names if name not in unpinned]
    here = [name for name in usable if at_hand(settings[name].model, settings[name].revision)]
    missing = [name for name in usable if name not in here]
    remedies = [f"fetched at first use: {', '.join(missing)}"] if missing else []
    if unpinned:
        remedies.append(f"{len(unpinned)} others need a commit or folder: lidit encoders")
    found = f"{', '.join(here) or 'none'} at hand"
    return Finding("ok" if here else "note", "encoders", found, "; ".join(remedies))


def needs_commit(model: str, revision: str | None) -> bool:
    """Whether every job refuses a model as it is named: no package, no folder here, no commit."""
    from lidit.text.packaged import PREFIX

    named = model.startswith(PREFIX) or Path(model).expanduser().is_dir()
    return not named and revision is None


def at_hand(model: str, revision: str | None) -> bool:
    """Whether an encoder's files are on this machine; asks no hub and no package index."""
    from huggingface_hub import try_to_load_from_cache

    from lidit.hub import is_hub_id
    from lidit.text.packaged import PREFIX, cache_folder

    if model.startswith(PREFIX):
        return any((cache_folder() / "models").glob(f"{model.removeprefix(PREFIX)}-*"))
    if not is_hub_id(model):
        return Path(model).expanduser().is_dir()
    return isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str)


def starting_ray() -> Finding:
    kind = (
        "a cluster, which jobs join"
        if os.environ.get("RAY_ADDRESS")
        else "a Ray of this machine alone"
    )
    if find_spec("ray") is None:
        return Finding("note", "ray", "not installed", "pip install 'lidit-pipeline[cluster]'")
    from pipelines.runtime import resources

    try:
        resources.connect()
        offered = resources.cluster_resources()
    except (InputError, JobError) as error:
        return Finding("bad", "ray", one_line(error, 300))
    return Finding(
        "ok", "ray", f"{offered.get('CPU', 0):g} CPUs, {offered.get('GPU', 0):g} GPUs: {kind}"
    )


def network() -> Finding:
    from pipelines.runtime.network import probe_network

    try:
        probe = probe_network()
    except (InputError, JobError) as error:
        return Finding(
            "bad",
            "network",
            one_line(error, 300),
            "run it again with NCCL_DEBUG=INFO in the workers",
        )
    where = "one machine" if probe.nodes == 1 else f"{probe.nodes} machines"
    step = MODEL_1B_BYTES * 2 * (probe.processes - 1) / probe.processes / max(probe.bandwidth, 1.0)
    found = (
        f"{probe.bandwidth / 1e9:.1f} GB/s, {probe.backend} over {probe.processes} processes of "
        f"{where}; "
        f"the gradients of LI-DiT-1B take {step * 1e3:,.0f} ms"
    )
    return network_finding(probe, found)


def network_finding(probe: NetworkProbe, found: str) -> Finding:
    """What a probe's figures mean, and what to do."""
    if probe.backend == "gloo":
        return Finding("note", "network", found, "no free GPU: this is the CPUs' network")
    if probe.processes == 1:
        return Finding("note", "network", found, "one free GPU: nothing was sent")
    if probe.nodes == 1:
        slow = probe.bandwidth < LEAST_IN_MACHINE
        remedy = (
            "NVLink gives 100 and more: look at nvidia-smi topo -m, and at the size of /dev/shm"
            if slow
            else ""
        )
        return Finding("note" if slow else "ok", "network", found, remedy)
    if probe.bandwidth >= LEAST_BETWEEN_MACHINES:
        return Finding("ok", "network", found)
    if not probe.least_adapters:
        return Finding(
            "bad",
            "network",
            found,
            "pods see no RDMA adapter: see infra/kuberay/rdma and docs/cluster.md",
        )
    if 0 <= probe.least_locked < LEAST_LOCKED:
        return Finding(
            "bad",
            "network",
            found,
            "raise the limit of locked memory (ulimit -l) of the container runtime",
        )
    return Finding(
        "bad",
        "network",
        found,
        "NCCL_DEBUG=INFO says which adapters NCCL takes; set NCCL_IB_HCA to them",
    )


if __name__ == "__main__":
    run(command)
