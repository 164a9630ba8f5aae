"""Rendered manifests as Python objects: the RayClusters and pod templates in them."""

from collections.abc import Iterator
from typing import Any

import yaml

Document = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet", "Job")


def load_documents(text: str) -> list[Document]:
    """Every YAML document of a rendered overlay."""
    return [document for document in yaml.safe_load_all(text) if document]


def cluster_spec(document: Document) -> Document | None:
    """The RayCluster spec inside a RayJob, a RayService or a RayCluster, None for
    any other kind.
    """
    if document["kind"] == "RayCluster":
        return document["spec"]
    place = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document["kind"])
    return document["spec"].get(place) if place else None


def pod_templates(document: Document) -> Iterator[tuple[str, Document]]:
    """(where, pod template) of every pod this document makes."""
    spec = document.get("spec") or {}
    if document["kind"] in WORKLOADS:
        yield "template", spec["template"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    if cluster := cluster_spec(document):
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster.get("workerGroupSpecs", []):
            yield f"worker group {group['groupName']}", group["template"]
