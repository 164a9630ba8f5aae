"""The manifest of the online platform: valid, closed but for one door, and with settings that our
code takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from infra.kuberay.documents import pod_templates
from infra.kuberay.together import together_errors
from infra.kuberay.validate import DOOR, check, load_schemas, rule_errors, security_errors
from pipelines.serving.door import CALLBACK, PLACE
from pipelines.serving.settings import ServeSettings
from tests.helpers.manifests import KUBERAY, Network, find, render, render_overlay

SPACE = "lidit"
POD = {"lidit/job": "serve", "app.kubernetes.io/part-of": "lidit"}


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    return render(KUBERAY / "serve")


def service(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(find(documents, "RayService", "lidit-serve"))


def test_the_manifest_passes_schema_rules_and_security(
    documents: list[dict[str, Any]], shared_data: Any
) -> None:
    schemas = load_schemas(shared_data / "kuberay")
    assert [error for document in documents for error in check(document, schemas)] == []
    assert list(together_errors([*render_overlay("small"), *documents])) == []


def test_its_settings_are_ours(documents: list[dict[str, Any]]) -> None:
    config = yaml.safe_load(service(documents)["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    settings = ServeSettings.model_validate(application["args"])
    assert settings.guards.needed
    assert settings.guards.words is not None
    assert settings.guards.classifier is not None
    assert application["import_path"] == "pipelines.serving.application:build"
    assert config["http_options"]["request_timeout_s"] > settings.limits.deadline_s
    assert {"name": CALLBACK, "value": PLACE} == DOOR
    mounted = [mount["mountPath"] for _, pod in pod_templates(service(documents)) for mount in
               pod["spec"]["containers"][0]["volumeMounts"]]  # fmt: skip
    assert settings.folder in mounted


def set_env(spec: dict[str, Any]) -> None:
    """The anchor is shared by all pods, so it is taken from one of them alone."""
    container = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["env"] = []


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no config": (lambda spec: spec.update(serveConfigV2="[]"), "serveConfigV2 is no YAML mapping"),
    "no import path": (
        lambda spec: spec.update(serveConfigV2="applications: [{name: a}]"),
        "serveConfigV2",
    ),
    "no cluster": (lambda spec: spec.pop("rayClusterConfig"), "rayClusterConfig is needed"),
    "head serves": (
        lambda spec: spec.update(excludeHeadPodFromServeSvc=False),
        "the head serves nobody",
    ),
    "early deletion": (
        lambda spec: spec.update(rayClusterDeletionDelaySeconds=60),
        "above the longest request",
    ),
    "early kill": (
        lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"].update(
            terminationGracePeriodSeconds=30
        ),
        "worker group studio: terminationGracePeriodSeconds",
    ),
    "no door": (set_env, "worker group gateway: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"),
    "no token": (lambda spec: spec["rayClusterConfig"].pop("authOptions"), "mode token"),
    "tasks on the head": (
        lambda spec: spec["rayClusterConfig"]["headGroupSpec"].update(rayStartParams={}),
        "the head must take no tasks",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_found(documents: list[dict[str, Any]], name: str) -> None:
    document = service(documents)
    act, message = BROKEN[name]
    act(document["spec"])
    errors = list(rule_errors(document))
    errors = errors or list(security_errors(document))
    assert any(message in error for error in errors), errors


def test_port_8000_is_the_ingress_controllers_alone(documents: list[dict[str, Any]]) -> None:
    network = Network([*render_overlay("small"), *documents])
    worker, head = POD | {"ray.io/node-type": "worker"}, POD | {"ray.io/node-type": "head"}
    controller = {"app.kubernetes.io/name": "ingress-nginx"}
    assert network.allows(controller, worker, 8000, "ingress-nginx", SPACE)
    assert network.allows(worker, head, 6379, SPACE, SPACE)
    for source, space in (
        ({}, SPACE),
        ({}, "default"),
        ({"lidit/job": "train", "ray.io/node-type": "worker"}, SPACE),
    ):
        assert not network.allows(source, worker, 8000, space, SPACE)
    for port in (6379, 8265, 10001, 52365):
        assert not network.allows(controller, worker, port, "ingress-nginx", SPACE)
        assert not network.allows(controller, head, port, "ingress-nginx", SPACE)
    assert not network.allows(controller, head, 8000, "ingress-nginx", SPACE)
