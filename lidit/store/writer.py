"""Writing a family, unit by unit, from any number of processes at once."""

from __future__ import annotations

import hashlib
import json
import mmap
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from lidit.errors import InputError, JobError
from lidit.store.corpus import Corpus
from lidit.store.counting import Counter
from lidit.store.files.atomic import (
    TEMPORARY_PREFIX,
    arrow_writer,
    crash_point,
    publish_bytes,
    publish_table,
    published,
    remove_if_abandoned,
)
from lidit.store.files.folder import Folder
from lidit.store.manifest import FAMILY_FILE, MANIFEST_FILE, named, spec_differences
from lidit.store.records import CommitRecord, UnitStatistics, family_digest, records_table, totals
from lidit.store.row_index import positions
from lidit.store.schema import FORMAT_VERSION, canonical_json, digest_of, seal, unseal
from lidit.store.shared import SharedStates, read_shared

SHARED_FILE = "shared.arrow"
ALIGNED_WITH = {"text": "captions", "latents": "samples"}
OBJECT_STORE_GRACE_SECONDS = 3600.0
_READERS = 16


class FamilyWriter:
    """One family being made. Small and picklable: every process of a job may hold its own."""

    def __init__(self, corpus: str, kind: str, name: str, spec: dict[str, Any]) -> None:
        self.corpus_location, self.kind, self.name, self.spec = corpus, kind, name, spec
        self.fingerprint = digest_of(spec)
        self.directory = f"{name}-{self.fingerprint[:12]}"
        self.folder = Folder.at(corpus).child(kind).child(self.directory)
        self._known_shared: str | None = None

    @classmethod
    def open_or_create(
        cls, corpus: str, kind: str, name: str, spec: dict[str, Any]
    ) -> FamilyWriter:
        """`spec` is everything that determines the values; its sha256 is the fingerprint and names
        the directory.

        Raises InputError where `corpus` is none, or the directory holds a family of another corpus.
        """
        if kind not in ALIGNED_WITH:
            raise ValueError(f"kind {kind!r}: {sorted(ALIGNED_WITH)}")
        opened = Corpus.open(corpus)
        writer = cls(opened.folder.location, kind, name, spec)
        writer.folder.create()
        facts = {
            "format": FORMAT_VERSION,
            "kind": kind,
            "name": name,
            "fingerprint": writer.fingerprint,
            "corpus": opened.digest,
            "spec": spec,
        }
        try:
            if not writer.folder.exists(FAMILY_FILE):
                publish_bytes(writer.folder, FAMILY_FILE, seal(facts), exclusive=True)
                crash_point("family-created")
        except FileExistsError:
            pass
        try:
            existing = unseal(writer.folder.read_bytes(FAMILY_FILE))
        except ValueError:
            raise InputError(
                f"{writer.folder.where(FAMILY_FILE)}: damaged; run lidit repair"
            ) from None
        differing = spec_differences(existing, json.loads(canonical_json(facts)))
        if differing:
            raise InputError(
                f"{writer.folder.location}: made for something else ({'; '.join(differing)}); "
                "delete this directory "
                "to make the family anew"
            )
        return writer

    @cached_property
    def corpus(self) -> Corpus:
        return Corpus.open(self.corpus_location)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("corpus", "_rows")}

    @cached_property
    def _rows(self) -> list[int]:
        rows: list[int] = self.corpus.units[ALIGNED_WITH[self.kind]].to_pylist()
        return rows

    def relatives(self) -> dict[str, list[str]]:
        """Other families of this name -> the fields in which their spec differs from this one."""
        return {
            family.directory: spec_differences(family.spec, self.spec)
            for family in self.corpus.families(self.kind)
            if family.name == self.name and family.directory != self.directory
        }

    # -- shared states -----------------------------------------------------------------------------

    def shared(self) -> SharedStates | None:
        """What `write_shared` stored; None before it. Units this writer publishes name these from
        then on.

        (On an object store two first writers may both succeed, the later one stands: units made
        with the values of the other name a digest that no longer exists, and so are computed
        again.)
        """
        content = self._shared_bytes()
        if content is None:
            return None
        self._known_shared = hashlib.sha256(content).hexdigest()
        table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        return read_shared(table, self._known_shared, self.folder.where(SHARED_FILE))

    def write_shared(self, table: pa.Table) -> SharedStates:
        """Store `shared_table(...)` unless it is there already; returns what is stored.

        The first writer wins and everybody uses its values, so units of two devices fit the same
        statistics.
        """
        if self._shared_bytes() is None:
            try:
                publish_table(self.folder, SHARED_FILE, table, exclusive=True)
                crash_point("shared-written")
            except FileExistsError:
                pass
        stored = self.shared()
        assert stored is not None
        return stored

    def _shared_bytes(self) -> bytes | None:
        try:
            return self.folder.read_bytes(SHARED_FILE)
        except FileNotFoundError:
            return None

    @property
    def shared_sha256(self) -> str | None:
        """sha256 of the shared states that stand; None before them, and for latents."""
        if (
            self.kind == "text"
            and self._known_shared is None
            and (content := self._shared_bytes()) is not None
        ):
            self._known_shared = hashlib.sha256(content).hexdigest()
        return self._known_shared

    # -- units -------------------------------------------------------------------------------------

    def pending(self, clean: bool = True) -> list[int]:
        """Units without a valid record, in order. With `clean`, dead writers' leftovers are
        removed.
        """
        listing, self._known_shared = self.folder.sizes(), None
        valid = {record.unit: record for record in self._valid_records(listing)}
        if clean:
            self._clean(listing, {record.file for record in valid.values()})
        return [unit for unit in range(self.corpus.num_units) if unit not in valid]

    def committed(self, unit: int) -> CommitRecord | None:
        """The unit's record where it stands and fits its file: such a unit need not be computed."""
        return self._record_on_disk(unit)

    def publish(
        self,
        unit: int,
        tables: pa.Table | Iterable[pa.Table],
        seconds: float | None = None,
        statistics: UnitStatistics | None = None,
    ) -> CommitRecord:
        """Publish one unit: data file, then record. Returns the record that stands.

        tables: the unit's rows in order, at once or in pieces; each piece becomes one record batch,
        so that a unit never has to fit in memory. seconds: what the unit cost; by default the time
        since this call. Where another process has committed the unit first, its record stands and
        this data is discarded. Raises JobError for a wrong number of rows, or a full disk.
        """
        started = time.monotonic()
        statistics = statistics or UnitStatistics()
        counter = Counter(tables if not isinstance(tables, pa.Table) else [tables])
        name = self.corpus.unit_name(unit)
        index: list[list[int]] | None = None

        def write(sink: Any) -> None:
            nonlocal index
            arrow_writer(counter)(sink)
            sink.flush()
            if self.kind == "text":  # read back: places in a file are known when it is written
                with Path(sink.file.name).open("rb") as written:
                    index = positions(mmap.mmap(written.fileno(), 0, access=mmap.ACCESS_COPY))

        with published(
            self.folder, lambda sha256: f"{name}-{sha256[:12]}.arrow", write, "data"
        ) as file:
            if counter.rows != self._rows[unit]:
                self.folder.remove(file.name)
                raise JobError(
                    f"{self.folder.location}: unit {unit} has {self._rows[unit]} "
                    f"{ALIGNED_WITH[self.kind]}, but "
                    f"{counter.rows} rows were to be published"
                )
            low, high = statistics.range
            ours = CommitRecord(
                unit=unit,
                file=file.name,
                rows=counter.rows,
                tokens=counter.tokens,
                bytes=file.bytes,
                sha256=file.sha256,
                seconds=round(time.monotonic() - started if seconds is None else seconds, 3),
                minimum=low,
                maximum=high,
                shared=self.shared_sha256,
                error=statistics.error.to_dict() if statistics.error else None,
                counts=statistics.counts,
                of=self._made_from(unit),
                index=index,
            )
            record = self._commit(ours)
            if record.file != file.name:
                self.folder.remove(file.name)
        return record

    def _commit(self, ours: CommitRecord) -> CommitRecord:
        name = f"{self.corpus.unit_name(ours.unit)}.json"
        if not self.folder.local and (theirs := self._record_on_disk(ours.unit)):
            return theirs
        try:
            publish_bytes(self.folder, name, ours.to_json(), "record", exclusive=True)
        except FileExistsError:
            if theirs := self._record_on_disk(ours.unit):
                return theirs
            publish_bytes(self.folder, name, ours.to_json(), "record")
        return ours

    def _record_on_disk(self, unit: int) -> CommitRecord | None:
        record = self._read_record(unit)
        if record is None or not self._fits(record, self.folder.size(record.file)):
            return None
        return record

    def _read_record(self, unit: int) -> CommitRecord | None:
        try:
            return CommitRecord.from_json(
                self.folder.read_bytes(f"{self.corpus.unit_name(unit)}.json")
            )
        except FileNotFoundError:
            return None
        except IsADirectoryError as error:
            raise InputError(
                f"{error.filename}: is a folder, not a file; delete it and run the same command "
                "again"
            ) from None

    def _fits(self, record: CommitRecord, size: int | None) -> bool:
        if record.of not in (None, self._made_from(record.unit)):
            return False
        return (
            size == record.bytes
            and record.rows == self._rows[record.unit]
            and record.shared == self.shared_sha256
        )

    def _made_from(self, unit: int) -> str:
        return self.corpus.digest_of_unit(ALIGNED_WITH[self.kind], unit)

    def _valid_records(self, listing: dict[str, int]) -> Iterator[CommitRecord]:
        units = [
            u for u in range(self.corpus.num_units) if f"{self.corpus.unit_name(u)}.json" in listing
        ]
        with ThreadPoolExecutor(_READERS) as pool:
            for unit, record in zip(units, pool.map(self._read_record, units), strict=True):
                if record and record.unit == unit and self._fits(record, listing.get(record.file)):
                    yield record

    def _clean(self, listing: dict[str, int], needed: set[str]) -> None:
        if any(name.startswith("MANIFEST-") for name in listing):
            needed = needed | self._named_by_manifest()
        for name in listing:
            if name in needed or not (name.startswith(TEMPORARY_PREFIX) or name.endswith(".arrow")):
                continue
            if name == SHARED_FILE:
                continue
            remove_if_abandoned(
                self.folder, name, partial(self._committed, name), OBJECT_STORE_GRACE_SECONDS
            )

    def _committed(self, name: str) -> bool:
        unit, _, _ = name.partition("-")
        if not unit.isdigit():
            return False
        record = self._read_record(int(unit))
        return (
            record is not None
            and record.file == name
            and self._fits(record, self.folder.size(name))
        )

    def _named_by_manifest(self) -> set[str]:
        manifest = self._manifest()
        if manifest is None:
            return set()
        try:
            table = self.folder.read_table(manifest["records"]["file"])
        except (FileNotFoundError, pa.ArrowInvalid):
            return set()
        return {manifest["records"]["file"], *table["file"].to_pylist()}

    # -- the end -----------------------------------------------------------------------------------

    def _manifest(self) -> dict[str, Any] | None:
        try:
            return unseal(self.folder.read_bytes(MANIFEST_FILE))
        except (FileNotFoundError, ValueError):
            return None

    def complete(self) -> bool:
        """Whether the manifest stands and every file it names is there with its size."""
        manifest = self._manifest()
        if manifest is None:
            return False
        listing = self.folder.sizes()
        reference = manifest["records"]
        if listing.get(reference["file"]) != reference["bytes"]:
            return False
        records = self.folder.read_table(reference["file"])
        return all(
            listing.get(file) == size
            for file, size in zip(
                records["file"].to_pylist(), records["bytes"].to_pylist(), strict=True
            )
        )

    def finish(self, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write the table of records and, last, MANIFEST.json; readers accept the family from then
        on.

        A manifest whose files are all there is kept as it is. Raises JobError while units are
        missing.
        """
        standing = self._manifest()
        if standing is not None and self.complete():
            return standing
        listing, self._known_shared = self.folder.sizes(), None
        records = list(self._valid_records(listing))
        if len(records) != self.corpus.num_units:
            raise JobError(
                f"{self.folder.location}: {self.corpus.num_units - len(records)} of "
                f"{self.corpus.num_units} units are "
                "missing; run the same command again"
            )
        table = records_table(records)
        file = publish_table(self.folder, lambda sha256: f"MANIFEST-{sha256[:12]}.arrow", table)
        crash_point("table-published")
        shared = None
        if self.shared_sha256 is not None:
            shared = {
                "file": SHARED_FILE,
                "bytes": self.folder.size(SHARED_FILE),
                "sha256": self.shared_sha256,
            }
        manifest = {
            "format": FORMAT_VERSION,
            "kind": self.kind,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "corpus": self.corpus.digest,
            "digest": family_digest(self.fingerprint, self.shared_sha256, table),
            **totals(records),
            "shared": shared,
            "records": named(file),
            "extra": extra or {},
        }
        publish_bytes(self.folder, MANIFEST_FILE, seal(manifest))
        crash_point("manifest-published")
        self._clean(self.folder.sizes(), {record.file for record in records} | {file.name})
        return manifest
