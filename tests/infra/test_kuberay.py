"""The KubeRay manifests: schemas, the operator's rules, security of every pod, run folders, honest
overlays.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.kuberay.documents import pod_templates
from infra.kuberay.together import run_folder_errors, shared_state_errors, together_errors
from infra.kuberay.validate import check, load_schemas, rule_errors, security_errors
from tests.helpers.manifests import KUBERAY, OVERLAYS, PARTS, REPOSITORY, find, render


@pytest.fixture(scope="module")
def schemas(shared_data: Path) -> dict[str, Any]:
    folder = shared_data / "kuberay"
    if not folder.is_dir():
        pytest.skip("no KubeRay CRD schemas beside this checkout")
    return load_schemas(folder)


@pytest.mark.parametrize(
    "part", ["models", *(f"overlays/{overlay}/{part}" for overlay in OVERLAYS for part in PARTS)]
)
def test_our_renderer_agrees_with_kustomize(part: str) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl here: its built-in kustomize is the reference")
    folder = KUBERAY / part
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 and "unknown command" in done.stderr:
        pytest.skip("this kubectl has no kustomize")
    assert done.returncode == 0, done.stderr
    reference = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(done.stdout)}
    ours = {(d["kind"], d["metadata"]["name"]): d for d in render(folder)}
    assert ours == reference


def test_manifests_pass_schema_rules_and_security(
    documents: list[dict[str, Any]], schemas: dict[str, Any]
) -> None:
    everything = [*documents, *render(KUBERAY / "models")]
    assert [error for document in everything for error in check(document, schemas)] == []
    assert list(together_errors(everything)) == []


@pytest.mark.parametrize("folder", ["base", "embed", "train"])
def test_without_an_overlay_no_image_is_pinned(folder: str) -> None:
    errors = [error for document in render(KUBERAY / folder) for error in check(document, None)]
    assert errors
    assert all("not pinned by digest" in error for error in errors)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_job_is_applied_by_itself_and_after_the_cluster(overlay: str) -> None:
    """Training that starts beside embedding finds no family, fails and is retried as one new
    cluster after another.
    """
    made = {part: render(KUBERAY / "overlays" / overlay / part) for part in PARTS}
    assert {d["metadata"]["name"] for d in made["embed"]} == {
        "lidit-embed-large",
        "lidit-embed-small",
    }
    assert {d["metadata"]["name"] for d in made["train"]} == {"lidit-train"}
    assert "RayJob" not in {d["kind"] for d in made["cluster"]}
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    steps = [
        "models",
        f"overlays/{'small'}/cluster",
        " ingest ",
        "overlays/small/embed",
        " latents ",
        " inspect ",
        "overlays/small/train",
    ]
    order = page[page.index("### Order") :]
    places = [order.index(step) for step in steps]
    assert places == sorted(places)


TYPOS = [
    ("RayJob", "lidit-embed-large", ["spec", "activeDeadlineSeconds"], "activeDeadlineSecond"),
    (
        "RayJob",
        "lidit-train",
        ["spec", "rayClusterSpec", "workerGroupSpecs", 1, "minReplicas"],
        "minReplica",
    ),
    (
        "RayJob",
        "lidit-embed-small",
        ["spec", "rayClusterSpec", "authOptions", "secretName"],
        "secretname",
    ),
    (
        "RayCluster",
        "lidit-interactive",
        [
            "spec",
            "headGroupSpec",
            "template",
            "spec",
            "containers",
            0,
            "securityContext",
            "readOnlyRootFilesystem",
        ],
        "readOnlyRootFileSystem",
    ),
    (
        "StatefulSet",
        "lidit-redis",
        ["spec", "template", "spec", "securityContext", "runAsNonRoot"],
        "runAsNonroot",
    ),
    ("NetworkPolicy", "operator-to-dashboard", ["spec", "ingress", 0, "from"], "form"),
]


@pytest.mark.parametrize(("kind", "name", "path", "typo"), TYPOS, ids=[typo[-1] for typo in TYPOS])
def test_a_planted_typo_fails(
    small: list[dict[str, Any]],
    schemas: dict[str, Any],
    kind: str,
    name: str,
    path: list[Any],
    typo: str,
) -> None:
    document = copy.deepcopy(find(small, kind, name))
    node = document
    for step in path[:-1]:
        node = node[step]
    node[typo] = node.pop(path[-1])
    assert any(typo in error for error in check(document, schemas))


def test_a_setting_in_the_wrong_section_is_found(small: list[dict[str, Any]]) -> None:
    """The API server refuses it, or drops it without a word where validation is off."""
    settings = put(find(small, "ConfigMap", "lidit-settings"), "metadata/LIDIT_RUNS", "/runs")
    assert check(settings, None) == [
        "ConfigMap/lidit-settings: metadata: unknown field 'LIDIT_RUNS'"
    ]


def put(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A deep copy with one value set; `None` removes the key."""
    changed = copy.deepcopy(document)
    node: Any = changed
    *steps, last = path.split("/")
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    if value is None:
        del node[int(last) if isinstance(node, list) else last]
    else:
        node[last] = value
    return changed


BROKEN_RULES = [
    ("metadata/name", "Lidit_Embed", "DNS-1035"),
    ("metadata/name", "l" * 48, "DNS-1035"),
    ("spec/shutdownAfterJobFinishes", False, "needs shutdownAfterJobFinishes"),
    ("spec/ttlSecondsAfterFinished", -1, "negative"),
    ("spec/activeDeadlineSeconds", 0, "not positive"),
    ("spec/backoffLimit", -1, "backoffLimit is negative"),
    ("spec/clusterSelector", {"ray.io/cluster": "x"}, "does not go with clusterSelector"),
    ("spec/submissionMode", "InteractiveMode", "does not go with InteractiveMode"),
    ("spec/submissionMode", "SidecarMode", "SidecarMode takes no"),
    ("spec/managedBy", "somebody", "managedBy"),
    ("spec/rayClusterSpec/managedBy", "somebody", "managedBy"),
    ("spec/runtimeEnvYAML", "just text", "runtimeEnvYAML"),
    ("spec/deletionStrategy", {}, "needs both"),
    ("spec/deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}, "needs both"),
    (
        "spec/deletionStrategy",
        {"deletionRules": [{"policy": "DeleteSelf", "condition": {}}]},
        "exactly one",
    ),
    (
        "spec/deletionStrategy",
        {"deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]},
        "do not go with shutdown",
    ),
    ("spec/rayClusterSpec/rayVersion", "2.51.0", "2.52"),
    ("spec/rayClusterSpec/headGroupSpec/rayStartParams/labels", "a=b", "not in rayStartParams"),
    ("spec/rayClusterSpec/headGroupSpec/resources", {"CPU": "0"}, "both in rayStartParams"),
    (
        "spec/rayClusterSpec/headGroupSpec/template/spec/restartPolicy",
        "Always",
        "restartPolicy Never",
    ),
    ("spec/rayClusterSpec/workerGroupSpecs/1/minReplicas", 5000, "minReplicas"),
    ("spec/rayClusterSpec/workerGroupSpecs/1/groupName", "cpu", "share a name"),
    ("spec/rayClusterSpec/workerGroupSpecs/1/labels", {"lidit/pool": "two words"}, "label value"),
    ("spec/rayClusterSpec/workerGroupSpecs/1/suspend", True, "cannot be suspended"),
    ("spec/rayClusterSpec/workerGroupSpecs/1/template/spec/containers", [], "no container"),
    (
        "spec/rayClusterSpec/headGroupSpec/rayStartParams/redis-password",
        "x",
        "gcsFaultToleranceOptions only",
    ),
    ("spec/rayClusterSpec/gcsFaultToleranceOptions/backend", "rocksdb", "takes no redis"),
    ("spec/rayClusterSpec", None, "rayClusterSpec and clusterSelector"),
]


@pytest.mark.parametrize(("path", "value", "message"), BROKEN_RULES)
def test_every_operator_rule_fires(
    small: list[dict[str, Any]], path: str, value: Any, message: str
) -> None:
    job = find(small, "RayJob", "lidit-embed-large")
    assert list(rule_errors(job)) == []
    assert any(message in error for error in rule_errors(put(job, path, value)))


POD_BREAKAGES: list[tuple[str, Any, str]] = [
    ("securityContext/runAsNonRoot", False, "runAsNonRoot"),
    ("securityContext/runAsUser", 0, "runAsUser"),
    ("securityContext/seccompProfile", {"type": "Unconfined"}, "seccompProfile"),
    ("automountServiceAccountToken", None, "automountServiceAccountToken"),
    ("hostNetwork", True, "hostNetwork"),
    ("containers/0/securityContext/readOnlyRootFilesystem", False, "readOnlyRootFilesystem"),
    ("containers/0/securityContext/allowPrivilegeEscalation", True, "allowPrivilegeEscalation"),
    (
        "containers/0/securityContext/capabilities",
        {"drop": ["ALL"], "add": ["SYS_PTRACE"]},
        "capabilities",
    ),
    ("containers/0/resources/requests/cpu", "1m", "requests must equal limits"),
    ("containers/0/image", "rayproject/ray:2.60.0", "not pinned by digest"),
    (
        "containers/0/env",
        [{"name": "AWS_SECRET_ACCESS_KEY", "value": "abc"}],
        "must come from a Secret",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), POD_BREAKAGES)
def test_every_security_promise_is_checked_on_every_pod(
    documents: list[dict[str, Any]], path: str, value: Any, message: str
) -> None:
    """Break one promise in one pod template at a time, in all of them: the finding names that
    template.
    """
    broken = 0
    for document in documents:
        for where, _ in pod_templates(document):
            changed = copy.deepcopy(document)
            template = dict(pod_templates(changed))[where]
            template["spec"] = put(template["spec"], path, value)
            assert any(where in error and message in error for error in security_errors(changed)), (
                where
            )
            broken += 1
    # two embeddings and train 4 each (submitter, head, two pools), interactive 3, redis 1
    assert broken == 16


def test_the_fast_network_is_the_training_pods_alone(small: list[dict[str, Any]]) -> None:
    """IPC_LOCK comes with an adapter and with nothing else; the queue knows the adapter, or the job
    waits for ever.
    """
    adapter, path = (
        "rdma/rdma_shared_device_a",
        "spec/rayClusterSpec/workerGroupSpecs/1/template/spec/containers/0/",
    )
    job = find(render(KUBERAY / "overlays" / "large" / "train"), "RayJob", "lidit-train")
    locked = {}
    for where, template in pod_templates(job):
        for container in template["spec"]["containers"]:
            assert (adapter in container["resources"]["limits"]) == (where == "worker group train")
            locked[where] = "IPC_LOCK" in container["securityContext"]["capabilities"].get(
                "add", []
            )
    assert [where for where, added in locked.items() if added] == ["worker group train"]
    queue = next(
        yaml.safe_load_all((KUBERAY / "kueue" / "queues.yaml").read_text().split("---", 1)[1])
    )
    assert adapter in queue["spec"]["resourceGroups"][0]["coveredResources"]
    env = {
        entry["name"]
        for entry in dict(pod_templates(job))["worker group train"]["spec"]["containers"][0]["env"]
    }
    assert {"NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG"} <= env

    without = put(
        find(small, "RayJob", "lidit-train"),
        path + "securityContext/capabilities/add",
        ["IPC_LOCK"],
    )
    assert any("beside an rdma/ resource" in error for error in security_errors(without))
    more = put(job, path + "securityContext/capabilities/add", ["IPC_LOCK", "SYS_PTRACE"])
    assert any("capabilities must drop ALL" in error for error in security_errors(more))


def test_training_has_the_image_with_a_compiler(documents: list[dict[str, Any]]) -> None:
    images = {
        where: template["spec"]["containers"][0]["image"].partition("@")[0].rpartition("/")[2]
        for where, template in pod_templates(find(documents, "RayJob", "lidit-train"))
    }
    assert images.pop("worker group train") == "lidit-cuda-compile"
    assert set(images.values()) == {"lidit-cpu"}


RAY_BREAKAGES: list[tuple[str, Any, str]] = [
    ("authOptions", {"mode": "disabled"}, "authOptions"),
    ("gcsFaultToleranceOptions", None, "gcsFaultToleranceOptions"),
    ("headGroupSpec/serviceType", "LoadBalancer", "ClusterIP"),
    ("headGroupSpec/enableIngress", True, "ingress"),
    ("headGroupSpec/rayStartParams/num-cpus", "4", "no tasks"),
    ("headGroupSpec/template/spec/containers/0/volumeMounts", [], "must be an emptyDir"),
    ("workerGroupSpecs/0/template/spec/volumes/2/emptyDir", {}, "Memory emptyDir"),
]


@pytest.mark.parametrize(("path", "value", "message"), RAY_BREAKAGES)
def test_ray_promises_are_checked_on_every_cluster(
    small: list[dict[str, Any]], path: str, value: Any, message: str
) -> None:
    for kind, name, prefix in (
        ("RayJob", "lidit-embed-large", "spec/rayClusterSpec/"),
        ("RayJob", "lidit-train", "spec/rayClusterSpec/"),
        ("RayCluster", "lidit-interactive", "spec/"),
    ):
        changed = put(find(small, kind, name), prefix + path, value)
        assert any(message in error for error in security_errors(changed)), name


# --- where runs are written -----------------------------------------------------------------------


def test_runs_go_to_one_claim_that_head_and_workers_mount(documents: list[dict[str, Any]]) -> None:
    assert list(run_folder_errors(documents)) == []
    for kind, name in (("RayJob", "lidit-train"), ("RayCluster", "lidit-interactive")):
        for where, template in pod_templates(find(documents, kind, name)):
            claims = [volume.get("persistentVolumeClaim") for volume in template["spec"]["volumes"]]
            assert ({"claimName": "lidit-runs"} in claims) is (where != "submitter"), (
                f"{name}: {where}"
            )


TRAIN_POD = "spec/rayClusterSpec/workerGroupSpecs/1/template/spec/"
BROKEN_RUN_FOLDERS = [
    (
        "ConfigMap",
        "lidit-settings",
        "data/LIDIT_RUNS",
        "s3://lidit/runs",
        "is not the absolute path of a folder",
    ),
    (
        "ConfigMap",
        "lidit-settings",
        "data/LIDIT_RUNS",
        None,
        "'$LIDIT_RUNS' is not the absolute path of a folder",
    ),
    (
        "ConfigMap",
        "lidit-settings",
        "data/LIDIT_RUNS",
        "/scratch/runs",
        "head: output /scratch/runs is not on a Pers",
    ),
    ("ConfigMap", "lidit-settings", "data/LIDIT_RUNS", "/models/runs", "mounted read-only"),
    (
        "RayJob",
        "lidit-train",
        TRAIN_POD + "containers/0/volumeMounts/6",
        None,
        "worker group train: output /runs is",
    ),
    (
        "RayJob",
        "lidit-train",
        TRAIN_POD + "volumes/6/persistentVolumeClaim/readOnly",
        True,
        "mounted read-only",
    ),
    (
        "RayJob",
        "lidit-train",
        TRAIN_POD + "volumes/6/persistentVolumeClaim/claimName",
        "x",
        "different claims",
    ),
    (
        "RayCluster",
        "lidit-interactive",
        "spec/headGroupSpec/template/spec/volumes/5",
        None,
        "head: output /runs is",
    ),
]


@pytest.mark.parametrize(("kind", "name", "path", "value", "message"), BROKEN_RUN_FOLDERS)
def test_a_run_folder_that_would_lose_the_run_is_found(
    small: list[dict[str, Any]], kind: str, name: str, path: str, value: Any, message: str
) -> None:
    whole = find(small, kind, name)
    broken = [put(document, path, value) if document is whole else document for document in small]
    assert any(message in error for error in run_folder_errors(broken)), list(
        run_folder_errors(broken)
    )


# A node of one's own has no queue and no spot price.
WITH_QUEUES = pytest.mark.parametrize("documents", ["small", "large"], indirect=True)


@WITH_QUEUES
def test_training_is_one_gang(documents: list[dict[str, Any]]) -> None:
    job = find(documents, "RayJob", "lidit-train")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "lidit"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "lidit-train"
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] > 0
    queues = {
        d["kind"]: d for d in yaml.safe_load_all((KUBERAY / "kueue" / "queues.yaml").read_text())
    }
    assert queues["LocalQueue"]["metadata"]["name"] == "lidit"
    assert queues["WorkloadPriorityClass"]["metadata"]["name"] == "lidit-train"
    quota = {
        r["name"]: r["nominalQuota"]
        for r in queues["ClusterQueue"]["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    }
    train = cluster["workerGroupSpecs"][1]
    gpus = (
        int(train["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        * train["replicas"]
    )
    assert gpus <= quota["nvidia.com/gpu"]


@WITH_QUEUES
def test_encoder_pools_are_separate_spot_and_may_be_empty(documents: list[dict[str, Any]]) -> None:
    for size in ("large", "small"):
        cluster = find(documents, "RayJob", f"lidit-embed-{size}")["spec"]["rayClusterSpec"]
        cpu, gpu = cluster["workerGroupSpecs"]
        pod = gpu["template"]["spec"]
        assert gpu["groupName"] == f"encode-{size}"
        assert gpu["minReplicas"] == 0
        assert gpu["labels"] == {"lidit/pool": f"encode-{size}"}
        assert pod["nodeSelector"] == {"lidit/capacity": "spot", "lidit/gpu": size}
        assert {
            "key": "lidit/capacity",
            "operator": "Equal",
            "value": "spot",
            "effect": "NoSchedule",
        } in pod["tolerations"]
        assert "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert cpu["minReplicas"] >= 1
        assert "nodeSelector" not in cpu["template"]["spec"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "spec/rayClusterSpec/gcsFaultToleranceOptions/externalStorageNamespace",
            "is another cluster's too",
        ),
        (
            "spec/rayClusterSpec/workerGroupSpecs/0/template/metadata/labels/lidit~job",
            "different labels lidit/job",
        ),
    ],
)
def test_clusters_that_share_what_must_be_their_own_are_found(
    small: list[dict[str, Any]], path: str, message: str
) -> None:
    """A third LLM is a copy of the second one's patch: what was not changed in it is named."""
    copied = find(small, "RayJob", "lidit-embed-small")
    *steps, last = (step.replace("~", "/") for step in path.split("/"))
    node: Any = copied
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node[step]
    node[last] = {"externalStorageNamespace": "lidit-embed-large"}.get(last, "embed-large")
    assert any(message in error for error in shared_state_errors(small))
    twin = {**find(small, "RayJob", "lidit-train"), "metadata": {"name": "twin"}}
    assert any("same label lidit/job" in error for error in shared_state_errors([*small, twin]))


def test_the_cache_of_units_fits_on_the_disk_of_the_pods_that_read_states(
    documents: list[dict[str, Any]],
) -> None:
    """The kubelet evicts a pod that holds more than its ephemeral storage."""
    settings = find(documents, "ConfigMap", "lidit-settings")["data"]
    for kind, name in (("RayJob", "lidit-train"), ("RayCluster", "lidit-interactive")):
        for where, template in pod_templates(find(documents, kind, name)):
            container = template["spec"]["containers"][0]
            own = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
            gigabytes = float({**settings, **own}["LIDIT_STORE_CACHE_GIGABYTES"])
            disk = container["resources"]["limits"]["ephemeral-storage"]
            assert disk.endswith("Gi")
            if where not in ("submitter", "head") and (name, where) != (
                "lidit-train",
                "worker group cpu",
            ):
                assert gigabytes * 1e9 < int(disk.removesuffix("Gi")) * 2**30, f"{name}: {where}"


# --- secrets and the command ----------------------------------------------------------------------


def test_referenced_secrets_and_maps_are_documented_and_never_shipped(
    documents: list[dict[str, Any]],
) -> None:
    assert not [d for d in documents if d["kind"] == "Secret"]
    text = yaml.safe_dump([*documents, *render(KUBERAY / "models")])
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    for name in (
        "lidit-ray-auth",
        "lidit-redis",
        "lidit-mlflow-client",
        "lidit-object-store",
        "lidit-recipe",
        "lidit-model-list",
        "lidit-hub",
        "lidit-models",
        "lidit-runs",
    ):
        assert name in text
        assert name in page


def test_the_command_reports_findings_and_exits_with_2(
    small: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "infra.kuberay.validate"]
    good = yaml.safe_dump_all(small)
    assert (
        subprocess.run(
            command, input=good, text=True, capture_output=True, check=False, cwd=REPOSITORY
        ).returncode
        == 0
    )
    job = put(find(small, "RayJob", "lidit-train"), "spec/suspend", True)
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump_all([put(job, "spec/shutdownAfterJobFinishes", False)]))
    done = subprocess.run(
        [*command, str(bad)], text=True, capture_output=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 2
    assert "RayJob/lidit-train: suspend needs shutdownAfterJobFinishes" in done.stdout
    lost = put(find(small, "ConfigMap", "lidit-settings"), "data/LIDIT_RUNS", "/scratch")
    bad.write_text(yaml.safe_dump_all([lost, find(small, "RayJob", "lidit-train")]))
    done = subprocess.run(
        [*command, str(bad)], text=True, capture_output=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 2
    assert (
        "RayJob/lidit-train: head: output /scratch is not on a PersistentVolumeClaim" in done.stdout
    )
    bad.write_text(yaml.safe_dump_all([find(small, "RayJob", "lidit-train")]))
    done = subprocess.run(
        [*command, str(bad)], text=True, capture_output=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 2
    assert "LIDIT_CORPUS, LIDIT_RUNS: in no ConfigMap of the job's pods" in done.stdout
