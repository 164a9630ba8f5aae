"""`overlays/node8`: every step fits one machine with 8 GPUs, by sums over all of its pods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.manifests import KUBERAY, find, render

NODE8 = KUBERAY / "overlays" / "node8"
# What a node of 96 CPUs and 1 TiB leaves to pods, with room for what every node runs besides.
ROOM = {"cpu": 92.0, "memory": 980.0, "ephemeral-storage": 900.0, "nvidia.com/gpu": 8.0}
UNITS = {"Gi": 1.0, "Mi": 1 / 1024, "m": 0.001, "": 1.0}


def amount(text: str) -> float:
    number = text.rstrip("GiMm")
    return float(number) * UNITS[text[len(number) :]]


def pods(cluster: dict[str, Any], at_most: bool) -> Iterator[tuple[dict[str, Any], int]]:
    """(pod, how many) of a Ray cluster: as many as it starts with, or grows to."""
    yield cluster["headGroupSpec"]["template"]["spec"], 1
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]["spec"], group["maxReplicas" if at_most else "minReplicas"]


def total(found: list[tuple[dict[str, Any], int]]) -> dict[str, float]:
    sums = dict.fromkeys(ROOM, 0.0)
    for pod, count in found:
        for container in pod["containers"]:
            for name, value in container["resources"]["requests"].items():
                sums[name] += count * amount(str(value))
    return sums


def clusters(part: str) -> list[dict[str, Any]]:
    return [document["spec"] for document in render(NODE8 / part) if document["kind"] == "RayJob"]


@pytest.mark.parametrize("part", ["embed", "train"])
def test_a_step_fits_beside_the_idle_interactive_cluster(part: str) -> None:
    cluster = render(NODE8 / "cluster")
    idle = find(cluster, "RayCluster", "lidit-interactive")["spec"]
    found = list(pods(idle, at_most=False))
    found.append((find(cluster, "StatefulSet", "lidit-redis")["spec"]["template"]["spec"], 1))
    autoscaled = [idle]
    for job in clusters(part):
        found += pods(job["rayClusterSpec"], at_most=True)
        found.append((job["submitterPodTemplate"]["spec"], 1))
        autoscaled += (
            [job["rayClusterSpec"]] if job["rayClusterSpec"]["enableInTreeAutoscaling"] else []
        )
    found += [
        ({"containers": [{"resources": one["autoscalerOptions"]["resources"]}]}, 1)
        for one in autoscaled
    ]
    needed = total(found)
    assert needed["nvidia.com/gpu"] == 8
    assert {name: value for name, value in needed.items() if value > ROOM[name]} == {}


def test_every_gpu_pod_goes_to_the_one_label_and_nothing_waits() -> None:
    selectors = set()
    for part in ("cluster", "embed", "train"):
        for document in render(NODE8 / part):
            cluster = (
                document["spec"].get("rayClusterSpec", document["spec"])
                if "spec" in document
                else {}
            )
            for group in cluster.get("workerGroupSpecs", []):
                pod = group["template"]["spec"]
                if any("nvidia.com/gpu" in c["resources"]["requests"] for c in pod["containers"]):
                    selectors.add(tuple(pod["nodeSelector"].items()))
    assert selectors == {(("lidit/gpu", "large"),)}
    (train,) = render(NODE8 / "train")
    assert train["spec"]["suspend"] is False
    assert not any("kueue" in label for label in train["metadata"]["labels"])
