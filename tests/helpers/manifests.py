"""A faithful application of the kustomize features our overlays use, and of NetworkPolicy: both
testable offline.

Kustomize: resources, components, namespace, images, JSON 6902 patches with a kind + name target;
anything else is refused.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Document = dict[str, Any]
Labels = dict[str, str]
REPOSITORY = Path(__file__).parents[2]
KUBERAY = REPOSITORY / "infra" / "kuberay"
OVERLAYS = ("small", "large", "node8")
PARTS = ("cluster", "embed", "train")
CLUSTER_SCOPED = {"Namespace", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass"}
FEATURES = {"apiVersion", "kind", "resources", "components", "namespace", "images", "patches"}


def render(folder: Path) -> list[Document]:
    """What `kubectl kustomize FOLDER` prints, as documents in file order."""
    return copy.deepcopy(_render(folder))


def render_overlay(name: str) -> list[Document]:
    """All parts of an overlay, in the order in which they are applied."""
    return [document for part in PARTS for document in render(KUBERAY / "overlays" / name / part)]


@cache
def _render(folder: Path) -> list[Document]:
    settings = _kustomization(folder, "Kustomization")
    documents: list[Document] = []
    for name in settings["resources"]:
        path = (folder / name).resolve()
        documents += render(path) if path.is_dir() else _documents(path)
    for name in settings.get("components", []):
        _transform(documents, _kustomization((folder / name).resolve(), "Component"), folder / name)
    _transform(documents, settings, folder)
    return documents


def _documents(path: Path) -> list[Document]:
    """The file's documents. An alias is a copy, as in kustomize: a patch of one place must not
    reach the others.
    """
    return [
        json.loads(json.dumps(document))
        for document in yaml.safe_load_all(path.read_text())
        if document
    ]


def _kustomization(folder: Path, kind: str) -> Document:
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert settings["kind"] == kind, f"{folder} is not a {kind}"
    assert set(settings) <= FEATURES, (
        f"{folder}: this renderer does not know {set(settings) - FEATURES}"
    )
    return settings


def _transform(documents: list[Document], settings: Document, folder: Path) -> None:
    for patch in settings.get("patches", []):
        target = patch["target"]
        matches = [
            i for i, d in enumerate(documents) if _identity(d) == (target["kind"], target["name"])
        ]
        assert len(matches) == 1, (
            f"{folder}: patch target {target} matches {len(matches)} documents"
        )
        operations = yaml.safe_load((folder / patch["path"]).read_text())
        documents[matches[0]] = jsonpatch.apply_patch(documents[matches[0]], operations)
    for document in documents:
        _set_images(document, settings.get("images", []))
        if "namespace" in settings and document["kind"] not in CLUSTER_SCOPED:
            document["metadata"]["namespace"] = settings["namespace"]


def _identity(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def _set_images(node: Any, images: list[Document]) -> None:
    if isinstance(node, list):
        for item in node:
            _set_images(item, images)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers") and isinstance(value, list):
                for container in value:
                    for image in images:
                        if container.get("image") == image["name"]:
                            container["image"] = (
                                f"{image.get('newName', image['name'])}@{image['digest']}"
                            )
                            break
            _set_images(value, images)


def find(documents: list[Document], kind: str, name: str) -> Document:
    """The one document of this kind and name."""
    (document,) = [d for d in documents if _identity(d) == (kind, name)]
    return document


def selects(selector: Document, labels: Labels) -> bool:
    """A Kubernetes label selector; the empty one selects everything."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        present = rule["key"] in labels
        match rule["operator"]:
            case "Exists":
                holds = present
            case "In":
                holds = present and labels[rule["key"]] in rule["values"]
            case operator:
                raise AssertionError(f"selector operator {operator} is not known here")
        if not holds:
            return False
    return True


class Network:
    """Who reaches whom under a set of NetworkPolicies, as a conforming network
    plugin decides it.
    """

    def __init__(self, documents: list[Document]) -> None:
        self.policies = [d for d in documents if d["kind"] == "NetworkPolicy"]

    def allows(
        self, source: Labels, target: Labels, port: int, source_space: str, target_space: str
    ) -> bool:
        """True when a TCP connection is let out of the source pod and into the target pod."""
        return self._lets(
            source, source_space, target, target_space, port, "Egress"
        ) and self._lets(target, target_space, source, source_space, port, "Ingress")

    def _lets(
        self, pod: Labels, space: str, peer: Labels, peer_space: str, port: int, direction: str
    ) -> bool:
        policies = [
            policy["spec"]
            for policy in self.policies
            if policy["metadata"]["namespace"] == space
            and direction in policy["spec"]["policyTypes"]
            and selects(policy["spec"]["podSelector"], pod)
        ]
        if not policies:
            return True
        side = {"Ingress": "from", "Egress": "to"}[direction]
        return any(
            self._rule_matches(rule, side, peer, peer_space, space, port)
            for policy in policies
            for rule in policy.get(direction.lower(), [])
        )

    @staticmethod
    def _rule_matches(
        rule: Document, side: str, peer: Labels, peer_space: str, space: str, port: int
    ) -> bool:
        ports = rule.get("ports")
        if ports is not None and not any(
            p["protocol"] == "TCP" and p["port"] == port for p in ports
        ):
            return False
        if side not in rule:
            return True
        for entry in rule[side]:
            if "ipBlock" in entry:  # pods are inside the cluster's range, which 0.0.0.0/0 covers
                if entry["ipBlock"]["cidr"] == "0.0.0.0/0":
                    return True
                continue
            in_space = (
                selects(entry["namespaceSelector"], {"kubernetes.io/metadata.name": peer_space})
                if "namespaceSelector" in entry
                else peer_space == space
            )
            if in_space and selects(entry.get("podSelector", {}), peer):
                return True
        return False
