"""The KubeRay network policies, applied to every pair of pods: one cluster talks to itself, the
ports stay closed.
"""

from __future__ import annotations

from typing import Any

import pytest

from infra.kuberay.documents import pod_templates
from tests.helpers.manifests import KUBERAY, REPOSITORY, Network, find, render

RAY_PORTS = (6379, 8265, 10001, 10002, 52365)
SPACE = "lidit"


def ray_pod(job: str, node: str) -> dict[str, str]:
    return {"lidit/job": job, "ray.io/node-type": node, "app.kubernetes.io/part-of": "lidit"}


@pytest.fixture
def network(small: list[dict[str, Any]]) -> Network:
    return Network(small)


def test_pods_of_one_cluster_reach_each_other(network: Network) -> None:
    for job in ("embed-large", "embed-small", "train", "interactive"):
        for port in RAY_PORTS:
            assert network.allows(ray_pod(job, "worker"), ray_pod(job, "head"), port, SPACE, SPACE)
            assert network.allows(ray_pod(job, "head"), ray_pod(job, "worker"), port, SPACE, SPACE)


@pytest.mark.parametrize("port", RAY_PORTS)
@pytest.mark.parametrize(
    ("source", "space"),
    [
        ({}, SPACE),
        ({"app": "notebook"}, "default"),
        ({"app": "prometheus"}, "monitoring"),
        ({"app": "another"}, "kuberay-operator"),
        (ray_pod("train", "worker"), SPACE),
        (ray_pod("embed-small", "worker"), SPACE),
        (ray_pod("embed-large", "worker"), "another-team"),
        ({"lidit/job": "train", "lidit/role": "submitter"}, SPACE),
        ({"lidit/job": "embed-small", "lidit/role": "submitter"}, SPACE),
        ({"lidit/role": "models"}, SPACE),
        ({"lidit/role": "redis"}, SPACE),
    ],
)
def test_ray_ports_are_closed_to_everyone_else(
    network: Network, source: dict[str, str], space: str, port: int
) -> None:
    assert not network.allows(source, ray_pod("embed-large", "head"), port, space, SPACE)


def test_only_the_named_doors_are_open(network: Network) -> None:
    head, worker = ray_pod("embed-large", "head"), ray_pod("embed-large", "worker")
    submitter = {"lidit/job": "embed-large", "lidit/role": "submitter"}
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    doors = [
        (submitter, SPACE, head, 8265),
        (operator, "kuberay-operator", head, 8265),
        ({}, "monitoring", worker, 8080),
    ]
    for source, space, target, open_port in doors:
        reached = [p for p in (*RAY_PORTS, 8080) if network.allows(source, target, p, space, SPACE)]
        assert reached == [open_port]


def test_redis_serves_heads_only(network: Network) -> None:
    redis = {"lidit/role": "redis"}
    assert network.allows(ray_pod("train", "head"), redis, 6379, SPACE, SPACE)
    assert not network.allows(ray_pod("train", "worker"), redis, 6379, SPACE, SPACE)
    assert not network.allows({}, redis, 6379, SPACE, SPACE)


def test_what_ray_pods_may_call(network: Network, small: list[dict[str, Any]]) -> None:
    mlflow = {"lidit/role": "mlflow"}
    assert network.allows(ray_pod("train", "worker"), mlflow, 5000, SPACE, "lidit-mlflow")
    assert not network.allows(ray_pod("train", "worker"), mlflow, 5432, SPACE, "lidit-mlflow")
    assert not network.allows(ray_pod("train", "worker"), {"app": "x"}, 80, SPACE, "default")
    # no autoscaler
    assert not network.allows(ray_pod("train", "head"), {"app": "api"}, 6443, SPACE, "default")
    assert network.allows(ray_pod("embed-large", "head"), {"app": "api"}, 6443, SPACE, "default")
    (block,) = [
        peer["ipBlock"]
        for rule in find(small, "NetworkPolicy", "ray-out")["spec"]["egress"]
        for peer in rule["to"]
        if "ipBlock" in peer
    ]
    assert "169.254.0.0/16" in block["except"]  # the cloud's metadata service hands out credentials


def test_the_pod_that_fills_the_claim_of_models_reaches_the_hub_and_nothing_of_ours(
    network: Network,
) -> None:
    (job,) = render(KUBERAY / "models")
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert network.allows(labels, {"app": "a hub"}, 443, SPACE, "default")
    assert not network.allows(labels, {"app": "a hub"}, 80, SPACE, "default")
    assert not network.allows(labels, {"lidit/role": "redis"}, 6379, SPACE, SPACE)


@pytest.mark.parametrize(
    "name", ["kuberay-operator", "monitoring", "lidit-mlflow", "k8s-app: kube-dns", "port 443"]
)
def test_what_the_policies_take_for_granted_is_written_down(
    small: list[dict[str, Any]], name: str
) -> None:
    assert name.split()[-1] in str([d for d in small if d["kind"] == "NetworkPolicy"])
    for page in (REPOSITORY / "docs" / "cluster.md", KUBERAY / "base" / "network-policies.yaml"):
        assert name in page.read_text(), page.name


def test_every_pod_template_is_covered_by_its_cluster_policy(
    documents: list[dict[str, Any]],
) -> None:
    """A pod whose label a policy does not know would still be closed, and its cluster would never
    come up.
    """
    network = Network(documents)
    for document in documents:
        if document["kind"] in ("RayJob", "RayCluster"):
            for where, template in pod_templates(document):
                labels = template["metadata"]["labels"]
                node = {"submitter": {}, "head": {"ray.io/node-type": "head"}}.get(
                    where, {"ray.io/node-type": "worker"}
                )
                head = {"lidit/job": labels["lidit/job"], "ray.io/node-type": "head"}
                assert network.allows({**labels, **node}, head, 8265, SPACE, SPACE), where
