"""Ingest: source files -> a corpus, one Ray task per source file.

Three steps, each resumable: every source is read and checked (CORPUS/ingest/), units are numbered over all sources and
written, corpus.json comes last. No image is copied.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from lidit.config import IngestSettings
from lidit.config.settings import PASSWORD, has_password
from lidit.errors import InputError
from lidit.sources import SourceFile, expand
from lidit.sources.base import IGNORED_KINDS, OTHER_KINDS
from lidit.sources.staging import STAGING, StagedSource, read_class_names, read_staged, stage_source
from lidit.sources.units import SourcePlan, WrittenSource, find_duplicates, plan_units, write_units
from lidit.store import Corpus, publish_corpus, publish_root
from lidit.store.corpus import CORPUS_FILE
from lidit.store.files.atomic import publish_bytes
from lidit.store.files.folder import Folder
from lidit.store.manifest import spec_differences
from lidit.store.schema import FORMAT_VERSION, canonical_json, unit_digits
from pipelines.runtime import resources
from pipelines.runtime.progress import Progress
from pipelines.runtime.prometheus import IngestMetrics

PLAN_FILE = "plan.json"
Report = Callable[[int, int, str], None]
DUPLICATE = "duplicate key"

SOURCES = pa.schema(
    [
        ("file", pa.string()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("samples", pa.int32()),
        ("refused", pa.int32()),
        ("quarantine", pa.string()),
        ("quarantine_bytes", pa.int64()),
        ("quarantine_sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class IngestSummary:
    """What an ingest came to. reasons: refused samples and files by category; skipped: it was finished before;
    moved_to: where its sources were found this time, if they lay elsewhere before."""

    corpus: str
    digest: str
    units: int
    samples: int
    captions: int
    refused: int
    refused_captions: int
    reasons: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    skipped: bool = False
    moved_to: str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        text = f"{self.samples} samples, {self.captions} captions, {self.units} units"
        if self.refused or self.refused_captions:
            listed = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.items())
            text += f"; refused {self.refused} samples, {self.refused_captions} captions ({listed or 'see quarantine'})"
        if self.moved_to is not None:
            return f"{text}; finished before, its sources are in {self.moved_to} now"
        return text + ("; finished before, nothing to do" if self.skipped else f"; {self.seconds:.1f} s")


def run_ingest(
    sources: list[str], corpus: str, settings: IngestSettings, progress: Report | None = None
) -> IngestSummary:
    """Make `corpus` from `sources` (files, folders, globs, URLs).

    progress: called with (source files done, source files, note); by default a bar is shown.
    A finished corpus of the same sources and settings is left alone but for where they lie, an interrupted one is
    finished. Raises InputError for sources or a folder that cannot be used, and for a corpus made from something else.
    """
    started = time.monotonic()
    if secret := next(filter(has_password, sources), None):
        raise InputError(f"source at {secret.rpartition('@')[2]}: {PASSWORD}")
    folder = Folder.at(corpus)
    if inside := [source for source in sources if folder.location.startswith(f"{Folder.at(source).location}/")]:
        raise InputError(f"{corpus}: lies inside the source {inside[0]}; name a folder outside it for --corpus")
    root, files = expand(sources)
    read_class_names(settings.class_names)
    plan = _plan(files, settings)
    if folder.exists(CORPUS_FILE):
        return _finished(Corpus.open(folder), plan, root)
    staging = folder.child(STAGING)
    _claim(folder, staging, plan)
    resources.connect()
    metrics = IngestMetrics(folder.location.rpartition("/")[2])
    if progress is not None:
        staged = _stage_all(staging, files, settings, metrics, progress)
    else:
        with Progress("ingest", len(files), "files") as bar:
            staged = _stage_all(staging, files, settings, metrics, lambda done, _, note: bar.update(done, note))
    if not any(entry.samples for entry in staged):
        reasons = sum((Counter(entry.refused) for entry in staged), Counter())
        listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5)) or "every source is empty"
        raise InputError(f"{', '.join(sources)}: not one usable sample ({listed}); {corpus} was not made")
    _same_kind(staged)
    duplicates = find_duplicates(staging, staged)
    plans = plan_units(staged, duplicates, settings.unit_samples)
    digits = unit_digits(sum(p.units for p in plans))
    written = _write_all(folder, staging, plans, settings.unit_samples, digits)
    reasons = sum((Counter(entry.refused) for entry in staged), Counter())
    if duplicates:
        reasons[DUPLICATE] = sum(len(copies) for copies in duplicates.values())
    totals = {
        "refused": sum(reasons.values()),
        "refused_captions": sum(entry.refused_captions for entry in staged),
        "reasons": dict(sorted(reasons.items())),
        "ignored": _ignored(staged),
    }
    rows = [row for source in written.values() for row in source.rows]
    table = _sources_table(staged, duplicates, written)
    made = publish_corpus(folder, rows, digits, root, table, plan["settings"], totals)
    staging.remove_tree()
    return _summary(made, skipped=False, seconds=time.monotonic() - started)


def _plan(files: list[SourceFile], settings: IngestSettings) -> dict[str, Any]:
    return {
        "format": FORMAT_VERSION,
        "settings": json.loads(canonical_json(settings.model_dump(mode="json"))),
        "files": {file.name: file.bytes for file in files},
    }


def _finished(corpus: Corpus, plan: dict[str, Any], root: str) -> IngestSummary:
    names, sizes = (corpus.sources[column].to_pylist() for column in ("file", "bytes"))
    before = {"settings": corpus.facts["settings"], "files": dict(zip(names, sizes, strict=True))}
    _refuse_differences(corpus.folder, before, plan)
    corpus.folder.child(STAGING).remove_tree()
    if root == corpus.root:
        return _summary(corpus, skipped=True, seconds=0.0)
    return _summary(publish_root(corpus, root), skipped=True, seconds=0.0, moved_to=root)


def _claim(folder: Folder, staging: Folder, plan: dict[str, Any]) -> None:
    """Make the folder ours, or make sure that it is the same ingest, interrupted."""
    if folder.local and folder.path.is_file():
        raise InputError(f"{folder.location}: is a file; name a folder for --corpus")
    try:
        before = json.loads(staging.read_bytes(PLAN_FILE))
    except FileNotFoundError:
        if [name for name in folder.folders() if name != STAGING] or folder.sizes():
            raise InputError(f"{folder.location}: not empty and not a corpus; name a new folder for --corpus") from None
        staging.create()
        publish_bytes(staging, PLAN_FILE, canonical_json(plan).encode())
        return
    _refuse_differences(folder, before, plan)


def _refuse_differences(folder: Folder, before: dict[str, Any], plan: dict[str, Any]) -> None:
    differing = spec_differences(before["settings"], plan["settings"])
    old, new = before["files"], plan["files"]
    differing += [f"source {name}: gone" for name in sorted(set(old) - set(new))[:5]]
    differing += [f"source {name}: new" for name in sorted(set(new) - set(old))[:5]]
    changed = sorted(name for name in set(old) & set(new) if old[name] != new[name])
    differing += [f"source {name}: {old[name]} -> {new[name]} bytes" for name in changed[:5]]
    if differing:
        raise InputError(
            f"{folder.location}: made from other sources or settings ({'; '.join(differing)}); name a new folder or "
            "delete this one"
        )


def _stage_all(
    staging: Folder, files: list[SourceFile], settings: IngestSettings, metrics: IngestMetrics, progress: Report
) -> list[StagedSource]:
    staged = {i: entry for i, file in enumerate(files) if (entry := read_staged(staging, file, i))}
    refused = sum(sum(entry.refused.values()) for entry in staged.values())
    progress(len(staged), len(files), _note(refused))
    pending = ((i, file) for i, file in enumerate(files) if i not in staged)
    calls = ((file.path, (staging, file, i, settings)) for i, file in pending)
    for entry in _in_tasks(stage_source, calls):
        staged[entry.index] = entry
        refused += sum(entry.refused.values())
        metrics.source_read(entry.samples, sum(entry.refused.values()))
        progress(len(staged), len(files), _note(refused))
    return [staged[i] for i in range(len(files))]


def _write_all(
    folder: Folder, staging: Folder, plans: list[SourcePlan], unit_samples: int, digits: int
) -> dict[int, WrittenSource]:
    calls = ((plan.name, (folder, staging, plan, unit_samples, digits)) for plan in plans)
    return {written.index: written for written in _in_tasks(write_units, calls)}


def _in_tasks(function: Callable[..., Any], calls: Iterable[tuple[str, tuple[Any, ...]]]) -> Iterator[Any]:
    """Results as they come, with a bounded number of tasks in flight. calls: (what it is about, arguments)."""
    # A worker that dies is retried twice: bytes that kill a decoder do so every time and must not loop for ever.
    task = ray.remote(num_cpus=1, max_retries=2)(function)
    limit = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, str] = {}
    remaining = iter(calls)
    while True:
        while len(running) < limit and (call := next(remaining, None)) is not None:
            running[task.remote(*call[1])] = call[0]
        if not running:
            return
        ready, _ = ray.wait(list(running), num_returns=1)
        subject = running.pop(ready[0])
        with resources.plain_errors(f"{subject}: the process reading it died three times; take this file out"):
            found = ray.get(ready[0])
        yield found


def _same_kind(staged: list[StagedSource]) -> None:
    images, samples = sum(entry.images for entry in staged), sum(entry.samples for entry in staged)
    if images in (0, samples):
        return
    without = next(entry.name for entry in staged if entry.images != entry.samples)
    raise InputError(
        f"{without}: has captions without images while other sources have images; ingest them into two corpora, or set "
        "captions_only"
    )


def _sources_table(
    staged: list[StagedSource], duplicates: dict[int, dict[int, str]], written: dict[int, WrittenSource]
) -> pa.Table:
    quarantines = [written[entry.index].quarantine for entry in staged]
    copies = [len(duplicates.get(entry.index, {})) for entry in staged]
    columns = {
        "file": [entry.name for entry in staged],
        "bytes": [entry.bytes for entry in staged],
        "sha256": [entry.sha256 for entry in staged],
        "samples": [entry.samples - n for entry, n in zip(staged, copies, strict=True)],
        "refused": [sum(entry.refused.values()) + n for entry, n in zip(staged, copies, strict=True)],
        "quarantine": [file and file.name for file in quarantines],
        "quarantine_bytes": [file and file.bytes for file in quarantines],
        "quarantine_sha256": [file and file.sha256 for file in quarantines],
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in SOURCES], schema=SOURCES)


def _ignored(staged: list[StagedSource]) -> dict[str, int]:
    """The most frequent kinds of members that were no part of a sample; the rest in one number."""
    counts = sum((Counter(entry.ignored) for entry in staged), Counter())
    others = counts.pop(OTHER_KINDS, 0)
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    others += sum(counts[kind] for kind in kinds[IGNORED_KINDS:])
    return {kind: counts[kind] for kind in sorted(kinds[:IGNORED_KINDS])} | ({OTHER_KINDS: others} if others else {})


def _note(refused: int) -> str:
    return f"{refused} refused" if refused else ""


def _summary(corpus: Corpus, skipped: bool, seconds: float, moved_to: str | None = None) -> IngestSummary:
    totals = corpus.facts["totals"]
    return IngestSummary(
        corpus.folder.location,
        corpus.digest,
        totals["units"],
        totals["samples"],
        totals["captions"],
        totals["refused"],
        totals["refused_captions"],
        totals["reasons"],
        totals["ignored"],
        skipped,
        moved_to,
        seconds,
    )
