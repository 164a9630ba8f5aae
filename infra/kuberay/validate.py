"""Check rendered manifests offline: the CRD schemas (unknown fields refused), KubeRay's own rules,
our security rules.

    for part in cluster embed train; do kubectl kustomize infra/kuberay/overlays/small/$part; echo
    ---; done > all.yaml python -m infra.kuberay.validate all.yaml --crds DIR

DIR holds `ray.io_rayjobs.yaml`, `ray.io_rayclusters.yaml` and `ray.io_rayservices.yaml` of the
installed operator: docs/cluster.md says how to get them. Prints one line per finding; exit code 2
when there is any. Give the parts
together: jobs are checked against the settings that the cluster's part holds.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from infra.kuberay.documents import WORKLOADS, Document, cluster_spec, load_documents, pod_templates
from infra.kuberay.together import together_errors

DNS1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")
SECRET_NAME = re.compile(r"password|secret|token|access_key|credential", re.IGNORECASE)
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
# The operator appends to these names; longer ones are refused at admission.
LONGEST_NAME = {"RayJob": 47, "RayCluster": 53, "RayService": 47}
CRDS = {
    "RayJob": "ray.io_rayjobs.yaml",
    "RayCluster": "ray.io_rayclusters.yaml",
    "RayService": "ray.io_rayservices.yaml",
}
# What keeps clients of Ray Serve from steering it: docs/serving.md.
DOOR = {
    "name": "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
    "value": "pipelines.serving.door:middlewares",
}
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
FIRST_VERSION_WITH_TOKENS = (2, 52)
METADATA_FIELDS = {"name", "namespace", "labels", "annotations"}


def strict(node: Any) -> Any:
    """A CRD's OpenAPI schema as JSON Schema that refuses fields it does not know."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {key: strict(value) for key, value in node.items()}
    if isinstance(closed.get("properties"), dict) and not node.get(
        "x-kubernetes-preserve-unknown-fields"
    ):
        closed.setdefault("additionalProperties", False)
    return closed


def load_schemas(folder: Path) -> dict[str, Document]:
    """JSON Schemas by kind: Ray's, and from inside them PodTemplate and NetworkPolicy rules."""
    schemas: dict[str, Document] = {}
    for kind, name in CRDS.items():
        crd = yaml.load((folder / name).read_text(), Loader=yaml.CSafeLoader)
        version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
        schemas[kind] = strict(version["schema"]["openAPIV3Schema"])
        schemas[kind]["properties"]["metadata"] = {"type": "object"}
    cluster = schemas["RayCluster"]["properties"]["spec"]["properties"]
    schemas["PodTemplate"] = cluster["headGroupSpec"]["properties"]["template"]
    schemas["PodTemplate"]["properties"]["metadata"] = {"type": "object"}
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]
    schemas["Ingress"], schemas["Egress"] = rules["ingressRules"], rules["egressRules"]
    return schemas


def schema_errors(document: Document, schemas: dict[str, Document]) -> Iterator[str]:
    """What the API server would refuse, and misspelt fields, which it would silently drop."""
    checks: list[tuple[str, Any]] = []
    if document["kind"] in CRDS:
        checks.append((document["kind"], document))
    elif document["kind"] in WORKLOADS:
        checks.append(("PodTemplate", document["spec"]["template"]))
    elif document["kind"] == "NetworkPolicy":
        spec = document["spec"]
        for field in set(spec) - {"podSelector", "policyTypes", "ingress", "egress"}:
            yield f"spec: unknown field {field!r}"
        checks += [("Ingress", spec.get("ingress", [])), ("Egress", spec.get("egress", []))]
    for kind, part in checks:
        for error in jsonschema.Draft202012Validator(schemas[kind]).iter_errors(part):
            yield f"{'.'.join(map(str, error.absolute_path)) or kind}: {error.message[:200]}"


def rule_errors(document: Document) -> Iterator[str]:
    """The operator's admission rules and the CRDs' CEL rules, which no JSON Schema holds (KubeRay
    1.7).
    """
    kind, spec = document["kind"], document.get("spec") or {}
    if kind not in LONGEST_NAME:
        return
    name = document["metadata"]["name"]
    if not DNS1035.fullmatch(name) or len(name) > LONGEST_NAME[kind]:
        yield f"name {name!r} is not a DNS-1035 label of at most {LONGEST_NAME[kind]} characters"
    if kind == "RayJob":
        yield from _job_errors(spec)
    if kind == "RayService":
        yield from _service_errors(spec)
    if (cluster := cluster_spec(document)) is not None:
        yield from _cluster_errors(cluster)


def _job_errors(spec: Document) -> Iterator[str]:
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    ttl = spec.get("ttlSecondsAfterFinished", 0)
    if ttl < 0:
        yield "ttlSecondsAfterFinished is negative"
    if ttl > 0 and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend") and not shutdown:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("clusterSelector"):
        if spec.get("suspend"):
            yield "suspend does not go with clusterSelector"
        if spec.get("backoffLimit", 0) > 0:
            yield "backoffLimit does not go with clusterSelector"
    elif "rayClusterSpec" not in spec:
        yield "one of rayClusterSpec and clusterSelector is needed"
    if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("preRunningDeadlineSeconds", 1) <= 0:
        yield "a deadline is not positive"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit does not go with InteractiveMode"
    if mode == "SidecarMode" and (
        {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(spec)
    ):
        yield "SidecarMode takes no submitterPodTemplate, submitterConfig or clusterSelector"
    if spec.get("managedBy", MANAGERS[0]) not in MANAGERS:
        yield f"managedBy must be one of {MANAGERS}"
    if "deletionStrategy" in spec:
        yield from _deletion_errors(spec["deletionStrategy"], bool(shutdown or ttl))
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is not a YAML mapping"


def _service_errors(spec: Document) -> Iterator[str]:
    """A service's config is a text that the operator hands to Serve: nothing else
    reads it before.
    """
    if "rayClusterConfig" not in spec:
        yield "rayClusterConfig is needed"
    try:
        config = yaml.safe_load(spec.get("serveConfigV2", ""))
        applications = config["applications"]
        names = [application["name"] for application in applications]
        places = [application["import_path"] for application in applications]
    except (yaml.YAMLError, KeyError, TypeError):
        yield "serveConfigV2 is no YAML mapping of applications with a name and an import_path"
        return
    if not names or len(set(names)) != len(names) or not all(":" in place for place in places):
        yield "serveConfigV2: applications need names of their own and an import_path MODULE:NAME"
    if spec.get("rayClusterConfig", {}).get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth does not go with a RayService"


def _deletion_errors(strategy: Document, has_shutdown: bool) -> Iterator[str]:
    legacy = [key for key in ("onSuccess", "onFailure") if key in strategy]
    rules = strategy.get("deletionRules")
    if legacy and rules is not None:
        yield "deletionStrategy: onSuccess/onFailure do not go with deletionRules"
    if len(legacy) != 2 and rules is None:
        yield "deletionStrategy needs both onSuccess and onFailure, or deletionRules"
    if rules is not None and has_shutdown:
        yield "deletionRules do not go with shutdownAfterJobFinishes or ttlSecondsAfterFinished"
    for rule in rules or []:
        if ("jobStatus" in rule["condition"]) == ("jobDeploymentStatus" in rule["condition"]):
            yield "a deletion condition takes exactly one of jobStatus and jobDeploymentStatus"


def _cluster_errors(spec: Document) -> Iterator[str]:
    if spec.get("managedBy", MANAGERS[0]) not in MANAGERS:
        yield f"managedBy must be one of {MANAGERS}"
    autoscaling = spec.get("enableInTreeAutoscaling", False)
    second_version = autoscaling and spec.get("autoscalerOptions", {}).get("version") == "v2"
    groups = [("head", spec["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in spec.get("workerGroupSpecs", [])]
    names = [name for name, _ in groups]
    if len(set(names)) != len(names):
        yield f"two groups share a name: {names}"
    for name, group in groups:
        params = group.get("rayStartParams") or {}
        pod = group["template"]["spec"]
        if not pod.get("containers"):
            yield f"{name}: no container"
        if "labels" in params:
            yield f"{name}: labels belong in the group's own field, not in rayStartParams"
        if group.get("resources") and any(params.get(key) for key in RESOURCE_PARAMS):
            yield f"{name}: resources are set both in rayStartParams and in resources"
        for key, value in (group.get("labels") or {}).items():
            if not LABEL_VALUE.fullmatch(value) or len(value) > 63:
                yield f"{name}: label {key}={value} is not a Kubernetes label value"
        if second_version and pod.get("restartPolicy", "Never") != "Never":
            yield f"{name}: autoscaler v2 needs restartPolicy Never or none"
        if autoscaling and group.get("suspend"):
            yield f"{name}: a group cannot be suspended under the autoscaler"
        low, high = group.get("minReplicas", 0), group.get("maxReplicas", 2147483647)
        if name != "head" and not low <= group.get("replicas", low) <= high:
            yield f"{name}: minReplicas <= replicas <= maxReplicas does not hold"
        if "maxReplicas" in group and low > high:
            yield f"{name}: minReplicas is above maxReplicas"
    yield from _fault_tolerance_errors(spec)
    if spec.get("authOptions", {}).get("mode") == "token":
        version = re.match(r"(\d+)\.(\d+)", spec.get("rayVersion", ""))
        if not version or tuple(map(int, version.groups())) < FIRST_VERSION_WITH_TOKENS:
            yield "authOptions.mode token needs rayVersion 2.52 or later"


def _fault_tolerance_errors(spec: Document) -> Iterator[str]:
    head = spec["headGroupSpec"]
    params = head.get("rayStartParams") or {}
    names = {entry["name"] for entry in head["template"]["spec"]["containers"][0].get("env", [])}
    options = spec.get("gcsFaultToleranceOptions")
    if "redis-username" in params or "REDIS_USERNAME" in names:
        yield "the redis user name belongs in gcsFaultToleranceOptions"
    if options is None:
        if "RAY_REDIS_ADDRESS" in names:
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    if "redis-password" in params or names & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}:
        yield "redis settings belong in gcsFaultToleranceOptions only"
    if options.get("backend") == "rocksdb" and {key for key in options if key.startswith("redis")}:
        yield "the rocksdb backend takes no redis settings"


def security_errors(document: Document) -> Iterator[str]:
    """The promises of SECURITY.md, for every pod this document makes."""
    cluster = cluster_spec(document)
    autoscaling = bool(cluster and cluster.get("enableInTreeAutoscaling"))
    if cluster is not None:
        auth = cluster.get("authOptions", {})
        if auth.get("mode") != "token" or not auth.get("secretName"):
            yield "authOptions: mode token with a secretName is required"
        if "gcsFaultToleranceOptions" not in cluster:
            yield "gcsFaultToleranceOptions is required"
        if cluster["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
            yield "the head's service must be ClusterIP"
        if cluster["headGroupSpec"].get("enableIngress"):
            yield "the head must have no ingress"
        if (cluster["headGroupSpec"].get("rayStartParams") or {}).get("num-cpus") != "0":
            yield 'the head must take no tasks (num-cpus: "0")'
        if autoscaling:
            options = cluster.get("autoscalerOptions", {})
            yield from _container_errors("autoscaler", options, with_image=False)
    if document["kind"] == "RayJob":
        spec = document["spec"]
        for field in (
            "activeDeadlineSeconds",
            "preRunningDeadlineSeconds",
            "backoffLimit",
            "ttlSecondsAfterFinished",
        ):
            if field not in spec:
                yield f"{field} is required"
        if not spec.get("shutdownAfterJobFinishes"):
            yield "shutdownAfterJobFinishes is required"
        if spec.get("submissionMode", "K8sJobMode") == "K8sJobMode":
            if "submitterPodTemplate" not in spec:
                yield "submitterPodTemplate is required: the default one has no security context"
            if spec.get("submitterConfig", {}).get("backoffLimit") != 0:
                yield "submitterConfig.backoffLimit must be 0"
    if document["kind"] == "RayService":
        yield from _serving_errors(document)
    for where, template in pod_templates(document):
        yield from (
            f"{where}: {error}" for error in _pod_errors(template, autoscaling and where == "head")
        )


def _serving_errors(document: Document) -> Iterator[str]:
    """No request is lost when the service changes, and no client reaches Serve past our door."""
    spec = document["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    if not spec.get("excludeHeadPodFromServeSvc"):
        yield "excludeHeadPodFromServeSvc is required: the head serves nobody"
    longest = (config.get("http_options") or {}).get("request_timeout_s")
    if not longest:
        yield "serveConfigV2: http_options.request_timeout_s is required"
        return
    if spec.get("rayClusterDeletionDelaySeconds", 60) <= longest:
        yield (
            f"rayClusterDeletionDelaySeconds must be above the longest request, {longest:g} seconds"
        )
    for where, template in pod_templates(document):
        pod = template["spec"]
        if where != "head" and pod.get("terminationGracePeriodSeconds", 30) <= longest:
            yield (
                f"{where}: terminationGracePeriodSeconds must be above the longest request, "
                f"{longest:g} seconds"
            )
        if DOOR not in pod["containers"][0].get("env", []):
            yield (
                f"{where}: {DOOR['name']} must be {DOOR['value']}, or clients steer Serve by "
                "headers"
            )


def _pod_errors(template: Document, needs_api_token: bool) -> Iterator[str]:
    pod = template["spec"]
    context = pod.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "runAsNonRoot: true and a runAsUser above 0 are required"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile RuntimeDefault is required"
    if pod.get("automountServiceAccountToken") is not needs_api_token:
        yield f"automountServiceAccountToken must be {str(needs_api_token).lower()}"
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"{field} is forbidden"
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']}: hostPath is forbidden"
    for container in pod["containers"] + pod.get("initContainers", []):
        yield from _container_errors(container["name"], container)
        if container["name"].startswith("ray-") and container["name"] != "ray-job-submitter":
            mounts = {
                mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])
            }
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            for path in ("/tmp", "/tmp/ray", "/dev/shm"):
                if "emptyDir" not in volumes.get(mounts.get(path, ""), {}):
                    yield (
                        f"{container['name']}: {path} must be an emptyDir, the root file "
                        "system is read-only"
                    )
            shared = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
            if shared.get("medium") != "Memory" or "sizeLimit" not in shared:
                yield f"{container['name']}: /dev/shm must be a Memory emptyDir with a sizeLimit"


def _container_errors(name: str, container: Document, with_image: bool = True) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: readOnlyRootFilesystem: true is required"
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"{name}: allowPrivilegeEscalation: false is required, privileged is forbidden"
    resources = container.get("resources", {})
    # Adapters of a fast network read memory that may not be swapped: the only capability, and
    # theirs alone.
    has_adapters = any(resource.startswith("rdma/") for resource in resources.get("limits") or {})
    allowed = [
        {"drop": ["ALL"]},
        *([{"drop": ["ALL"], "add": ["IPC_LOCK"]}] if has_adapters else []),
    ]
    if context.get("capabilities") not in allowed:
        yield (
            f"{name}: capabilities must drop ALL and add none, but IPC_LOCK beside an rdma/ "
            "resource"
        )
    if not resources.get("limits") or resources.get("requests") != resources["limits"]:
        yield f"{name}: resource requests must equal limits"
    elif not {"cpu", "memory"} <= set(resources["limits"]):
        yield f"{name}: cpu and memory limits are required"
    if with_image and not DIGEST.fullmatch(container.get("image", "")):
        yield f"{name}: image {container.get('image')!r} is not pinned by digest"
    for entry in container.get("env", []):
        if SECRET_NAME.search(entry["name"]) and "secretKeyRef" not in entry.get("valueFrom", {}):
            yield f"{name}: {entry['name']} must come from a Secret"


def check(document: Document, schemas: dict[str, Document] | None) -> list[str]:
    """Every finding for one document, each with the document's kind and name in front."""
    label = f"{document['kind']}/{document.get('metadata', {}).get('name')}"
    errors: list[str] = []
    if document["kind"] == "Secret":
        errors.append("no Secret belongs in a manifest: create it beside them")
    for field in sorted(set(document.get("metadata") or {}) - METADATA_FIELDS):
        errors.append(f"metadata: unknown field {field!r}")
    if schemas is not None:
        errors += schema_errors(document, schemas)
    # The rules walk the structure that the schema promises, so a broken structure is reported
    # alone.
    if not errors:
        errors += [*rule_errors(document), *security_errors(document)]
    return [f"{label}: {error}" for error in errors]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "manifests", nargs="?", type=Path, help="rendered manifests (default: standard input)"
    )
    parser.add_argument(
        "--crds", type=Path, help="folder with the operator's CRD files; without it no schema check"
    )
    arguments = parser.parse_args()
    text = arguments.manifests.read_text() if arguments.manifests else sys.stdin.read()
    schemas = load_schemas(arguments.crds) if arguments.crds else None
    documents = load_documents(text)
    errors = [error for document in documents for error in check(document, schemas)]
    # It walks pods as the checks above promise them to be, so broken ones are reported alone.
    errors = errors or list(together_errors(documents))
    print(*errors, sep="\n", end="\n" if errors else "")
    print(json.dumps({"documents": len(documents), "findings": len(errors)}))
    return 2 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
