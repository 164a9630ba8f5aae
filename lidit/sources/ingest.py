"""Ingest: source files -> a corpus. What is the same on one machine and on many.

Three steps, each resumable: every source is read and checked (CORPUS/ingest/), units are numbered
over all sources and written, corpus.json comes last. No image is copied. `ingest` takes one source
after the other in this process, a notebook's way; `pipelines.corpus.ingest` makes the same two
calls per source in Ray tasks. Both write the same bytes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lidit.config import IngestSettings
from lidit.config.passwords import has_password
from lidit.config.settings import PASSWORD
from lidit.errors import InputError, one_line
from lidit.progress import SILENT, Progress
from lidit.sources import FieldNames, SourceFile, expand
from lidit.sources.base import IGNORED_KINDS, OTHER_KINDS
from lidit.sources.columns import EMPTY, MAX_COLUMNS, lines_about
from lidit.sources.staging import (
    STAGING,
    StagedSource,
    read_class_names,
    read_staged,
    stage_source,
    staged_name,
)
from lidit.sources.units import (
    SourceListing,
    WrittenSource,
    find_duplicates,
    number_units,
    write_units,
)
from lidit.store import Corpus, publish_corpus, publish_root
from lidit.store.corpus import CORPUS_FILE
from lidit.store.files.atomic import publish_bytes, remove_leftovers
from lidit.store.files.folder import Folder
from lidit.store.files.owner import MARK, owned
from lidit.store.manifest import spec_differences
from lidit.store.schema import FORMAT_VERSION, canonical_json, unit_digits

PLAN_FILE = "plan.json"
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
    """What an ingest came to.

    reasons: refused samples and files by category; ignored: what was left out, by kind; skipped: it
    was finished before; moved_to: where its sources are now, if they lay elsewhere before; images:
    samples with an image, None for a corpus that does not say; joined: rows that gave captions to
    an earlier one of the same image; told: the columns that were found, and the settings that would
    take more.
    """

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
    images: int | None = None
    joined: int = 0
    told: tuple[str, ...] = ()


def ingest(
    sources: Sequence[str], corpus: str, settings: IngestSettings, progress: Progress = SILENT
) -> IngestSummary:
    """Make `corpus` from `sources` (files, folders, globs, URLs) in this process, one source file
    after the other.

    A finished corpus of the same sources and settings is left alone but for where they lie, an
    interrupted one is finished. Raises InputError for sources or a folder that cannot be used, and
    for a corpus made from something else.
    """
    job = Ingest(sources, corpus, settings)
    return job.finished() or ingest_here(job, progress)


def ingest_here(job: Ingest, progress: Progress = SILENT) -> IngestSummary:
    """An ingest that is not finished, in this process."""
    with owned(job.folder, "made"):
        # Read and check every source that no earlier call has read.
        unread = job.begin(progress)
        for index, file in unread:
            job.add_read(stage_source(job.staging, file, index, job.settings), progress)

        # Write every source's units; writing them again after a crash gives the same bytes.
        written = [write_units(job.folder, job.staging, listing) for listing in job.number_units()]
        return job.publish(written)


class Ingest:
    """One ingest from its plan to its corpus. Reads and writes small files only: the heavy calls
    are its user's.
    """

    def __init__(self, sources: Sequence[str], corpus: str, settings: IngestSettings) -> None:
        """List the sources. Raises InputError for sources that cannot be used, before anything is
        written.
        """
        self._started = time.monotonic()
        if secret := next(filter(has_password, sources), None):
            raise InputError(f"source at {secret.rpartition('@')[2]}: {PASSWORD}")
        self.folder = Folder.at(corpus)
        self.staging = self.folder.child(STAGING)
        inside = [
            s for s in sources if self.folder.location.startswith(f"{Folder.at(s).location}/")
        ]
        if inside:
            raise InputError(
                f"{corpus}: lies inside the source {inside[0]}; name a folder outside it "
                "for --corpus"
            )
        if self.folder.local and self.folder.path.is_file():
            raise InputError(f"{self.folder.location}: is a file; name a folder for --corpus")
        self.sources, self.corpus, self.settings = sources, corpus, settings
        self.fields = FieldNames(
            settings.caption_fields, settings.image_fields, settings.captions_only
        )
        self.root, self.files, self.left_out, self.loose = expand(list(sources), self.fields)
        read_class_names(settings.class_names)
        # What the corpus is made from: an interrupted or finished one of anything else is refused.
        self.plan = {
            "format": FORMAT_VERSION,
            "settings": json.loads(canonical_json(settings.model_dump(mode="json"))),
            "files": {file.name: file.bytes for file in self.files},
        }
        self._read: dict[int, StagedSource] = {}
        self._refused = 0
        self._duplicates: dict[int, dict[int, str]] = {}

    def finished(self) -> IngestSummary | None:
        """The summary of the corpus where it is finished, its sources' place noted anew where they
        have moved.
        """
        if not self.folder.exists(CORPUS_FILE):
            return None
        made = Corpus.open(self.folder)
        names, sizes = (made.sources[column].to_pylist() for column in ("file", "bytes"))
        before = {"settings": made.facts["settings"], "files": dict(zip(names, sizes, strict=True))}
        self._refuse_differences(before)
        self.staging.remove_tree()
        if self.root == made.root:
            return _summary(made, skipped=True)
        return _summary(publish_root(made, self.root), skipped=True, moved_to=self.root)

    def begin(self, progress: Progress = SILENT) -> list[tuple[int, SourceFile]]:
        """Make the folder ours, or make sure that it holds this ingest, interrupted; the sources
        still to be read.
        """
        self._claim()
        staged = [read_staged(self.staging, file, index) for index, file in enumerate(self.files)]
        self._read = {entry.index: entry for entry in staged if entry is not None}
        self._refused = sum(sum(entry.refused.values()) for entry in self._read.values())
        progress.expect(len(self.files), done=len(self._read))
        progress.update(len(self._read), self._note())
        return [(index, file) for index, file in enumerate(self.files) if index not in self._read]

    def add_read(self, staged: StagedSource, progress: Progress = SILENT) -> None:
        """`stage_source` has read one more source."""
        self._read[staged.index] = staged
        self._refused += sum(staged.refused.values())
        progress.update(len(self._read), self._note())

    def number_units(self) -> list[SourceListing]:
        """Every source's units, once all sources are read. InputError where no sample is usable or
        kinds are mixed; then the folder is as it was before, for the corrected command has other
        settings.
        """
        staged = self._in_order()
        try:
            self._require_samples(staged)
            _require_one_kind(staged)
        except InputError:
            self.staging.remove_tree()
            raise
        for group in ("samples", "captions", "quarantine"):
            remove_leftovers(self.folder.child(group))
        self._duplicates = find_duplicates(self.staging, staged)
        return number_units(staged, self._duplicates, self.settings.unit_samples)

    def _require_samples(self, staged: Sequence[StagedSource]) -> None:
        if not any(entry.samples for entry in staged):
            reasons = sum((Counter(entry.refused) for entry in staged), Counter())
            counts = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
            left = ", ".join(f"{count} x {kind}" for kind, count in self._left_out(staged).items())
            counts += f"{'; ' if counts else ''}left out {left}" if left else ""
            found = [
                *self._first_refusal(staged),
                *lines_about(_columns(staged), self.fields, 0, 0),
            ]
            raise InputError(
                f"{', '.join(self.sources)}: not one usable sample "
                f"({counts or 'every source is empty'}); "
                f"{self.corpus} was not made{''.join(f'; {line}' for line in found)}"
            )

    def publish(self, written: Sequence[WrittenSource]) -> IngestSummary:
        """Write what counts over all sources and, last, corpus.json; remove the staged files."""
        staged = self._in_order()
        reasons = sum((Counter(entry.refused) for entry in staged), Counter())
        joined = {source.index: source.joined for source in written}
        copies = {index: len(rows) - joined[index] for index, rows in self._duplicates.items()}
        if any(copies.values()):
            reasons[DUPLICATE] = sum(copies.values())
        images = sum(entry.images for entry in staged)
        totals = {
            "refused": sum(reasons.values()),
            "refused_captions": sum(entry.refused_captions for entry in staged),
            "reasons": dict(sorted(reasons.items())),
            "ignored": self._left_out(staged),
            "joined": sum(joined.values()),
            "images": sum(row["samples"] for source in written for row in source.rows)
            if images
            else 0,
            "columns": _columns(staged),
        }
        rows = [row for source in written for row in source.rows]
        table = _sources_table(staged, copies, written)
        digits = unit_digits(len(rows))
        made = publish_corpus(
            self.folder, rows, digits, self.root, table, self.plan["settings"], totals
        )
        self.staging.remove_tree()
        return _summary(made, seconds=time.monotonic() - self._started)

    def _claim(self) -> None:
        try:
            before = json.loads(self.staging.read_bytes(PLAN_FILE))
        except FileNotFoundError:
            if [
                name for name in self.folder.folders() if name != STAGING
            ] or self.folder.sizes().keys() - {MARK}:
                raise InputError(
                    f"{self.folder.location}: not empty and not a corpus; name a new folder for "
                    "--corpus"
                ) from None
            self.staging.create()
            publish_bytes(self.staging, PLAN_FILE, canonical_json(self.plan).encode())
            return
        self._refuse_differences(before)

    def _refuse_differences(self, before: dict[str, Any]) -> None:
        """InputError where an earlier ingest into this folder had other settings or sources."""
        old, new = before["files"], self.plan["files"]
        differing = spec_differences(before["settings"], self.plan["settings"])
        differing += [f"source {name}: gone" for name in sorted(set(old) - set(new))[:5]]
        differing += [f"source {name}: new" for name in sorted(set(new) - set(old))[:5]]
        changed = sorted(name for name in set(old) & set(new) if old[name] != new[name])
        differing += [f"source {name}: {old[name]} -> {new[name]} bytes" for name in changed[:5]]
        if differing:
            raise InputError(
                f"{self.folder.location}: made from other sources or settings "
                f"({'; '.join(differing)}); name a new "
                "folder or delete this one"
            )

    def _left_out(self, staged: Sequence[StagedSource]) -> dict[str, int]:
        # too few, where two sources name one image
        unnamed = self.loose - sum(entry.named for entry in staged)
        return _ignored(
            staged, self.left_out | ({"image that no row names": unnamed} if unnamed > 0 else {})
        )

    def _first_refusal(self, staged: Sequence[StagedSource]) -> list[str]:
        """In full: a count says that captions are missing, the reason what was there instead."""
        index = next((entry.index for entry in staged if entry.refused), None)
        if index is None:
            return []
        reasons = self.staging.read_table(f"{staged_name(index)}-refused.arrow")["reason"]
        return [f"the first refusal is {one_line(reasons[0].as_py(), 300)!r}"]

    def _in_order(self) -> list[StagedSource]:
        return [self._read[index] for index in range(len(self.files))]

    def _note(self) -> str:
        return f"{self._refused} refused" if self._refused else ""


def _require_one_kind(staged: Sequence[StagedSource]) -> None:
    images, samples = sum(entry.images for entry in staged), sum(entry.samples for entry in staged)
    if images in (0, samples):
        return
    without = next(entry.name for entry in staged if entry.images != entry.samples)
    raise InputError(
        f"{without}: has captions without images while other sources have images; ingest them "
        "into two corpora, or set "
        "captions_only"
    )


def _sources_table(
    staged: Sequence[StagedSource], duplicates: dict[int, int], written: Sequence[WrittenSource]
) -> pa.Table:
    quarantine_of = {source.index: source.quarantine for source in written}
    quarantines = [quarantine_of[entry.index] for entry in staged]
    samples = {source.index: sum(row["samples"] for row in source.rows) for source in written}
    columns = {
        "file": [entry.name for entry in staged],
        "bytes": [entry.bytes for entry in staged],
        "sha256": [entry.sha256 for entry in staged],
        "samples": [samples[entry.index] for entry in staged],
        "refused": [
            sum(entry.refused.values()) + duplicates.get(entry.index, 0) for entry in staged
        ],
        "quarantine": [file and file.name for file in quarantines],
        "quarantine_bytes": [file and file.bytes for file in quarantines],
        "quarantine_sha256": [file and file.sha256 for file in quarantines],
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in SOURCES], schema=SOURCES)


def _columns(staged: Sequence[StagedSource]) -> dict[str, str]:
    """Columns of all sources -> type, that of the first source where a column is not empty."""
    found: dict[str, str] = {}
    for entry in staged:
        for name, kind in entry.columns.items():
            if found.get(name, EMPTY) == EMPTY and (name in found or len(found) < MAX_COLUMNS):
                found[name] = kind
    return found


def _ignored(staged: Sequence[StagedSource], left_out: Mapping[str, int]) -> dict[str, int]:
    """The most frequent kinds of files and members that were no part of a sample; the rest in one
    number."""
    counts = sum((Counter(entry.ignored) for entry in staged), Counter(left_out))
    others = counts.pop(OTHER_KINDS, 0)
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    others += sum(counts[kind] for kind in kinds[IGNORED_KINDS:])
    return {kind: counts[kind] for kind in sorted(kinds[:IGNORED_KINDS])} | (
        {OTHER_KINDS: others} if others else {}
    )


def _summary(
    corpus: Corpus, skipped: bool = False, seconds: float = 0.0, moved_to: str | None = None
) -> IngestSummary:
    totals, settings = corpus.facts["totals"], corpus.facts["settings"]
    fields = FieldNames(
        settings["caption_fields"], tuple(settings["image_fields"]), settings["captions_only"]
    )
    images = totals.get("images")  # the first release did not count them
    told = (
        () if images is None else lines_about(totals["columns"], fields, totals["samples"], images)
    )
    return IngestSummary(
        corpus=corpus.folder.location,
        digest=corpus.digest,
        units=totals["units"],
        samples=totals["samples"],
        captions=totals["captions"],
        refused=totals["refused"],
        refused_captions=totals["refused_captions"],
        reasons=totals["reasons"],
        ignored=totals["ignored"],
        skipped=skipped,
        moved_to=moved_to,
        seconds=seconds,
        images=images,
        joined=totals.get("joined", 0),
        told=tuple(told),
    )
