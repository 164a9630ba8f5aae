"""Rules that no document shows alone: commands and the settings they use, the folder of runs,
clusters kept apart.
"""

import shlex
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from subprocess import list2cmdline

from infra.kuberay.documents import Document, cluster_spec, pod_templates

# what somebody sends to a cluster that has no entrypoint of its own
ANY_TRAINING = "output=$LIDIT_RUNS"
OPERATORS = frozenset(";&|<>()\n")
GLOBS = frozenset("*?[")


def together_errors(documents: list[Document]) -> Iterator[str]:
    """Everything this module checks, each finding with its document's kind and name in front."""
    yield from shared_state_errors(documents)
    if errors := list(entrypoint_errors(documents)):  # what comes next reads the commands
        yield from errors
        return
    yield from run_folder_errors(documents)


def entrypoint_errors(documents: list[Document]) -> Iterator[str]:
    """A RayJob's command reaches our jobs as it was meant.

    KubeRay pastes `entrypoint` as it stands into the command of bash in the submitter pod, which
    has no settings and no recipe; Ray's CLI joins the words that bash made of it
    (subprocess.list2cmdline); sh in the job's own pod, which has the settings, reads that line. So
    a variable needs single quotes, and an operator would end the submission.
    """
    for document in documents:
        spec = document.get("spec") or {}
        if document["kind"] == "RayJob" and spec.get("submissionMode", "K8sJobMode") in (
            "K8sJobMode",
            "SidecarMode",
        ):
            settings = _settings(spec["rayClusterSpec"]["headGroupSpec"]["template"], documents)
            for error in _command_errors(spec.get("entrypoint", ""), settings):
                yield f"{_label(document)}: entrypoint: {error}"


def _command_errors(entrypoint: str, settings: dict[str, str]) -> Iterator[str]:
    where = "the submitter pod, which has no settings"
    if errors := list(_open_characters(entrypoint, where, "$`")):
        yield from errors
        return
    if not (words := shlex.split(entrypoint)):
        yield "there is no command"
        return
    line = list2cmdline(words)
    if "$$" in line or not string.Template(line).is_valid():
        yield "a dollar sign stands before something else than a variable's name"
        return
    unset = [name for name in string.Template(line).get_identifiers() if name not in settings]
    if unset:
        yield (
            f"{', '.join(unset)}: in no ConfigMap of the job's pods (were the cluster's "
            "manifests given too?)"
        )
        return
    if errors := list(_open_characters(line, "the job's pod", "`")):
        yield from errors
        return
    for name in string.Template(line).get_identifiers():
        if shlex.quote(settings[name]) != settings[name]:
            yield (
                f"{name}={settings[name]!r}: the job's shell would not take this value as one word"
            )
    if shlex.split(line) != words:
        yield f"the job's shell would read {line!r} as other words"


def _open_characters(line: str, where: str, expanded: str) -> Iterator[str]:
    """What a shell does to a line besides taking quotes off: expansions (of `expanded`), operators,
    file patterns.
    """
    quote, escaped = "", False
    for character in line:
        if escaped:
            escaped = False
        elif quote == "'":
            quote = "" if character == quote else quote
        elif character == "\\":
            escaped = True
        elif character in expanded:
            yield f"{character!r} outside single quotes is expanded in {where}"
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in OPERATORS:
            yield f"{character!r} outside quotes ends the command in {where}"
        elif character in GLOBS:
            yield f"{character!r} outside quotes is a file pattern in {where}"
    if quote or escaped:
        yield f"a quote is left open in {where}"


def shared_state_errors(documents: list[Document]) -> Iterator[str]:
    """Every cluster keeps its head's state under a name of its own, and its pods can be told from
    all others.
    """
    clusters = [document for document in documents if cluster_spec(document) is not None]
    spaces = Counter(
        (cluster_spec(document) or {})
        .get("gcsFaultToleranceOptions", {})
        .get("externalStorageNamespace")
        for document in clusters
    )
    jobs = Counter(job for document in clusters for job in _job_labels(document))
    for document in clusters:
        space = (
            (cluster_spec(document) or {})
            .get("gcsFaultToleranceOptions", {})
            .get("externalStorageNamespace")
        )
        if spaces[space] > 1:
            yield f"{_label(document)}: externalStorageNamespace {space!r} is another cluster's too"
        if len(names := _job_labels(document)) != 1:
            yield (
                f"{_label(document)}: its pods have different labels lidit/job: "
                f"{sorted(map(str, names))}"
            )
        elif jobs[next(iter(names))] > 1:
            yield (
                f"{_label(document)}: another cluster's pods have the same label lidit/job, "
                "and so reach its ports"
            )


def _job_labels(document: Document) -> set[str | None]:
    return {
        template["metadata"].get("labels", {}).get("lidit/job")
        for _, template in pod_templates(document)
    }


def _label(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def _settings(template: Document, documents: list[Document]) -> dict[str, str]:
    """The plain variables of a pod's first container: its ConfigMaps, then its own."""
    maps = {d["metadata"]["name"]: d.get("data", {}) for d in documents if d["kind"] == "ConfigMap"}
    container = template["spec"]["containers"][0]
    sources = [entry.get("configMapRef", {}).get("name") for entry in container.get("envFrom", [])]
    settings = {key: value for name in sources for key, value in maps.get(name, {}).items()}
    return settings | {
        entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry
    }


def run_folder_errors(documents: list[Document]) -> Iterator[str]:
    """Every cluster that trains has its `output` on one writable claim, mounted in the head and all
    workers.

    Workers write their parts of a checkpoint, the driver publishes the model and a retry is a new
    set of pods: a folder of one pod, or a URL, would lose the run.
    """
    for document in documents:
        # a service trains nothing
        if cluster_spec(document) is None or document["kind"] == "RayService":
            continue
        for word in shlex.split(document["spec"].get("entrypoint", ANY_TRAINING)):
            key, _, value = word.partition("=")
            if key == "output":
                yield from (
                    f"{_label(document)}: {error}"
                    for error in _claim_errors(document, value, documents)
                )


def _claim_errors(document: Document, output: str, documents: list[Document]) -> Iterator[str]:
    claims = set()
    for where, template in pod_templates(document):
        if where == "submitter":  # it only sends the command
            continue
        folder = string.Template(output).safe_substitute(_settings(template, documents))
        if not folder.startswith("/"):
            yield f"{where}: output {folder!r} is not the absolute path of a folder"
            continue
        mount, claim = _claim_at(PurePosixPath(folder), template["spec"])
        if claim is None:
            yield f"{where}: output {folder} is not on a PersistentVolumeClaim mounted in this pod"
        elif claim.get("readOnly") or mount.get("readOnly"):
            yield f"{where}: output {folder} is mounted read-only"
        else:
            claims.add(claim["claimName"])
    if len(claims) > 1:
        yield f"output is on different claims in different pods: {', '.join(sorted(claims))}"


def _claim_at(folder: PurePosixPath, pod: Document) -> tuple[Document, Document | None]:
    """(mount, claim) that a path of the pod's first container lies on; the innermost mount hides
    the others.
    """
    mounts = {mount["mountPath"]: mount for mount in pod["containers"][0].get("volumeMounts", [])}
    places = (str(place) for place in (folder, *folder.parents))
    mount: Document = next((mounts[place] for place in places if place in mounts), {})
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    return mount, volumes.get(mount.get("name"), {}).get("persistentVolumeClaim")
