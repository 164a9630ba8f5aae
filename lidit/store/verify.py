"""Is a corpus what was written? Every file against what names it; deep: every value and alignment,
some rows anew.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lidit.errors import InputError, one_line
from lidit.progress import SILENT, Progress
from lidit.store.coding.transform import standardise
from lidit.store.corpus import INGEST_ANEW, Corpus
from lidit.store.families import TextFamily
from lidit.store.files.atomic import FileDigest
from lidit.store.files.folder import Folder
from lidit.store.latent_file import LatentFile
from lidit.store.manifest import FAMILY_FILE, MANIFEST_FILE, ROLLING_FILE
from lidit.store.records import CommitRecord
from lidit.store.samples import caption_digest
from lidit.store.schema import digest_of, unseal
from lidit.store.text_file import TextFile
from lidit.store.writer import ALIGNED_WITH

# Recomputing a row on another device or in another dtype moves it by a few hundredths of a
# deviation; the row of another caption is off by more than one.
REENCODE_TOLERANCE = 0.1
LOST = {"int4": 0.1}  # deviations that a storage itself may lose, beside coded's `storage_error`
JOBS = {"text": "embed", "latents": "latents"}

Encode = Callable[[TextFamily, Sequence[str]], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. family: (kind, directory) or None for what ingest wrote; unit: None
    beyond one unit.
    """

    file: str
    reason: str
    remedy: str
    family: tuple[str, str] | None = None
    unit: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}; {self.remedy}"


@dataclass
class VerifyReport:
    """problems: empty when the corpus is sound; notes: unfinished families, which are no error."""

    files: int = 0
    bytes: int = 0
    rows_encoded_again: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.problems


def verify_corpus(
    path: str,
    deep: bool = False,
    encode: Encode | None = None,
    encode_rows: int = 16,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Check sizes, checksums, row counts and Arrow structure of every file of a corpus.

    Args:
        path: Folder or URL of the corpus.
        deep: Whether to check every value and alignment too.
        encode: Computes captions again with a family's own encoder: (family, captions) -> one
            [T, W] tensor each.
            None compares no states.
        encode_rows: Captions of each text family that are computed again.
        progress: Counts files; more of them turn up with every family.

    Returns:
        A report; `report.sound` says whether the corpus is what was written, `report.problems`
        names file, reason and remedy of each fault, `report.notes` unfinished families.

    Raises:
        InputError: There is no corpus at `path`.
    """
    checker = _Checker(Corpus.open(path), deep, progress)
    if not checker.ingested():
        return checker.report
    for kind in ALIGNED_WITH:
        for directory in checker.corpus.folder.child(kind).folders():
            checker.family(kind, directory)
    report = checker.report
    if encode is not None and report.sound:
        for handle in checker.corpus.text_families():
            if handle.complete:
                checker.encode_again(
                    checker.corpus.text_family(handle.directory), encode, encode_rows
                )
    return report


class _Checker:
    def __init__(self, corpus: Corpus, deep: bool, progress: Progress) -> None:
        self.corpus, self.deep, self.progress = corpus, deep, progress
        self.report = VerifyReport()
        self.expected = 0

    def file(
        self,
        folder: Folder,
        written: FileDigest,
        remedy: str,
        family: Any = None,
        unit: int | None = None,
    ) -> bytes | None:
        """The bytes of a file that is what was written; None, with a problem noted, where the file
        differs.
        """
        self.report.files += 1
        self.progress.update(self.report.files)
        where, reason = folder.where(written.name), None
        try:
            content = bytes(folder.map(written.name))
        except FileNotFoundError:
            content, reason = b"", "missing"
        except IsADirectoryError:
            content, reason = b"", "is a folder, not a file"
            remedy = f"delete this folder, then {remedy}"
        if reason is None and len(content) != written.bytes:
            reason = f"{len(content)} bytes, {written.bytes} were written"
        elif reason is None and hashlib.sha256(content).hexdigest() != written.sha256:
            reason = "damaged: sha256 differs from what was written"
        self.report.bytes += len(content)
        if reason is None:
            return content
        self.report.problems.append(Problem(where, reason, remedy, family, unit))
        return None

    def _expect(self, files: int) -> None:
        self.expected += files
        self.progress.expect(self.expected)

    # -- what ingest wrote -------------------------------------------------------------------------

    def ingested(self) -> bool:
        """Check everything but the families; False where the unit table is lost, without which they
        mean nothing.
        """
        folder = self.corpus.folder
        remedy = INGEST_ANEW
        self._expect(2)
        contents = {}
        for table_name in ("units", "sources"):
            contents[table_name] = self.file(
                folder, _recorded(self.corpus.facts[table_name]), remedy
            )
        if contents["units"] is None:
            return False
        rows = self.corpus.units.to_pylist()
        self._expect(2 * len(rows))
        for row in rows:
            tables = {}
            for group in ("samples", "captions"):
                name = f"{group}/{self.corpus.unit_name(row['unit'])}.arrow"
                content = self.file(
                    folder, FileDigest(name, row[f"{group}_bytes"], row[f"{group}_sha256"]), remedy
                )
                table = self._arrow(content, folder.where(name), row[group], remedy)
                if table is not None:
                    tables[group] = table
            if self.deep and len(tables) == 2:
                self._unit(row["unit"], tables["samples"], tables["captions"], remedy)
        if contents["sources"] is not None and "quarantine" in self.corpus.sources.schema.names:
            quarantines = [row for row in self.corpus.sources.to_pylist() if row["quarantine"]]
            self._expect(len(quarantines))
            for row in quarantines:
                name = f"quarantine/{row['quarantine']}"
                self.file(
                    folder,
                    FileDigest(name, row["quarantine_bytes"], row["quarantine_sha256"]),
                    remedy,
                )
        return True

    def _arrow(
        self,
        content: bytes | None,
        where: str,
        rows: int,
        remedy: str,
        family: Any = None,
        unit: int | None = None,
    ) -> pa.Table | None:
        if content is None:
            return None
        try:
            table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
            table.validate(full=True)
            reason = (
                None if table.num_rows == rows else f"{table.num_rows} rows, {rows} were recorded"
            )
        except pa.ArrowInvalid as error:
            reason = f"not a valid Arrow file: {one_line(error)}"
        if reason is None:
            return table
        self.report.problems.append(Problem(where, reason, remedy, family, unit))
        return None

    def _unit(self, unit: int, samples: pa.Table, captions: pa.Table, remedy: str) -> None:
        name = self.corpus.unit_name(unit)
        for text, digest in zip(
            captions["text"].to_pylist(), captions["sha256"].to_pylist(), strict=True
        ):
            if caption_digest(text) != digest:
                where = self.corpus.folder.where(f"captions/{name}.arrow")
                self.report.problems.append(
                    Problem(where, f"sha256 of caption {text[:40]!r} differs", remedy)
                )
        indices = [
            reference["index"] for row in samples["captions"].to_pylist() for reference in row
        ]
        if set(indices) != set(range(captions.num_rows)):
            where = self.corpus.folder.where(f"samples/{name}.arrow")
            self.report.problems.append(
                Problem(where, "caption indices do not fit the captions", remedy)
            )

    # -- families ----------------------------------------------------------------------------------

    def family(self, kind: str, directory: str) -> None:
        folder = self.corpus.folder.child(kind).child(directory)
        family = (kind, directory)
        remedy = f"run lidit repair, then lidit {JOBS[kind]} to compute what is missing"
        if not folder.exists(MANIFEST_FILE) and folder.exists(ROLLING_FILE):
            self._rolling(folder, family, remedy)
            return
        facts, manifest = (
            self._sealed(folder, name, family, remedy) for name in (FAMILY_FILE, MANIFEST_FILE)
        )
        if facts is None or manifest is None:
            return
        if self._foreign(folder, family, facts, manifest, remedy):
            return
        shared, table = manifest["shared"], manifest["records"]
        self._expect(1 if shared is None else 2)
        if shared is not None:
            self.file(folder, _recorded(shared), remedy, family)
        if self.file(folder, _recorded(table), remedy, family) is None:
            return
        records = folder.read_table(table["file"]).to_pylist()
        if [record["unit"] for record in records] != list(range(self.corpus.num_units)):
            where = folder.where(table["file"])
            self.report.problems.append(
                Problem(where, "does not list every unit once", remedy, family)
            )
        self._expect(len(records))
        for record in records:
            self._family_unit(folder, family, record, manifest, remedy)

    def _rolling(self, folder: Folder, family: tuple[str, str], remedy: str) -> None:
        """A rolling family: the units that are there, each against its own record."""
        facts, manifest = (
            self._sealed(folder, name, family, remedy) for name in (FAMILY_FILE, ROLLING_FILE)
        )
        if (
            facts is None
            or manifest is None
            or self._foreign(folder, family, facts, manifest, remedy)
        ):
            return
        self.file(folder, _recorded(manifest["shared"]), remedy, family)
        names = {
            f"{self.corpus.unit_name(unit)}.json": unit for unit in range(self.corpus.num_units)
        }
        there = 0
        for name in sorted(names.keys() & folder.sizes().keys()):
            record = CommitRecord.from_json(folder.read_bytes(name))
            if record is None or record.unit != names[name]:
                problem = Problem(
                    folder.where(name),
                    "is no commit record of its unit",
                    remedy,
                    family,
                    names[name],
                )
                self.report.problems.append(problem)
                continue
            there += 1
            self.file(
                folder,
                FileDigest(record.file, record.bytes, record.sha256),
                remedy,
                family,
                record.unit,
            )
        self.report.notes.append(
            f"{folder.location}: rolling, {there} of {self.corpus.num_units} units are there"
        )

    def _sealed(
        self, folder: Folder, name: str, family: tuple[str, str], remedy: str
    ) -> dict[str, Any] | None:
        """A sealed JSON file of a family; None, with what is wrong noted, where it
        cannot be used.
        """
        where = folder.where(name)
        try:
            return unseal(folder.read_bytes(name))
        except FileNotFoundError:
            if name == MANIFEST_FILE:
                job = f"lidit {JOBS[family[0]]}"
                self.report.notes.append(f"{folder.location}: unfinished; {job} goes on with it")
            elif folder.sizes():
                self.report.problems.append(Problem(where, "missing", remedy, family))
        except IsADirectoryError:
            remedy = f"delete this folder, then {remedy}"
            self.report.problems.append(Problem(where, "is a folder, not a file", remedy, family))
        except ValueError:
            self.report.problems.append(Problem(where, "damaged", remedy, family))
        return None

    def _foreign(
        self,
        folder: Folder,
        family: tuple[str, str],
        facts: dict[str, Any],
        manifest: dict[str, Any],
        remedy: str,
    ) -> bool:
        """Whether family.json or the manifest are whole but of another family or corpus: what
        readers refuse.
        """
        _, directory = family
        fingerprint = digest_of(facts.get("spec"))
        expected = f"{facts.get('name')}-{fingerprint[:12]}"
        problems = []
        if facts.get("fingerprint") != fingerprint:
            problems.append((FAMILY_FILE, "the fingerprint does not belong to the spec"))
        elif expected != directory:
            problems.append((FAMILY_FILE, f"is of the family {expected}"))
        elif manifest.get("fingerprint") != fingerprint:
            problems.append((MANIFEST_FILE, "is of another family"))
        for name, content in ((FAMILY_FILE, facts), (MANIFEST_FILE, manifest)):
            if content.get("corpus") != self.corpus.digest:
                problems.append((name, "was made for another corpus"))
        for name, reason in problems:
            self.report.problems.append(Problem(folder.where(name), reason, remedy, family))
        return bool(problems)

    def _family_unit(
        self,
        folder: Folder,
        family: tuple[str, str],
        record: dict[str, Any],
        manifest: dict[str, Any],
        remedy: str,
    ) -> None:
        unit, where = record["unit"], folder.where(record["file"])

        def problem(file: str, reason: str) -> None:
            self.report.problems.append(Problem(file, reason, remedy, family, unit))

        name = f"{self.corpus.unit_name(unit)}.json"
        try:
            commit = CommitRecord.from_json(folder.read_bytes(name))
        except (FileNotFoundError, IsADirectoryError):
            commit = None
        if commit is None:
            problem(folder.where(name), "commit record damaged or missing")
        elif commit.unit != unit:
            problem(folder.where(name), f"is the commit record of unit {commit.unit}")
        elif commit.file == record["file"] and commit.sha256 != record["sha256"]:
            problem(folder.where(name), "commit record contradicts the manifest")
        elif commit.of not in (None, self.corpus.digest_of_unit(ALIGNED_WITH[family[0]], unit)):
            problem(where, f"was made from other {ALIGNED_WITH[family[0]]} than the corpus has")
        content = self.file(folder, _recorded(record), remedy, family, unit)
        table = self._arrow(content, where, record["rows"], remedy, family, unit)
        if table is None or content is None:
            return
        group = ALIGNED_WITH[family[0]]
        if table.num_rows != self.corpus.units[group][unit].as_py():
            problem(
                where,
                f"{table.num_rows} rows, but the unit has {self.corpus.units[group][unit]} {group}",
            )
            return
        try:
            file = (TextFile if family[0] == "text" else LatentFile).load(bytearray(content), where)
        except InputError as error:
            problem(where, str(error).removeprefix(f"{where}: "))
            return
        if self.deep and (reason := _unreasonable(file, table)):
            problem(where, reason)

    # -- computing again ---------------------------------------------------------------------------

    def encode_again(self, family: TextFamily, encode: Encode, count: int) -> None:
        shared = family.shared()
        allowed = REENCODE_TOLERANCE + 2 * family.spec.get(
            "storage_error", LOST.get(str(family.spec.get("storage")), 0.0)
        )
        for unit, rows in _spread_rows(family, count):
            texts = self.corpus.captions(unit)["text"].to_pylist()
            again = encode(family, [texts[row] for row in rows])
            self.report.rows_encoded_again += len(rows)
            for row, stored, fresh in zip(rows, family.read(unit, rows), again, strict=True):
                where = family.folder.where(family.record(unit)["file"])
                reason = None
                if stored.shape != fresh.shape:
                    reason = (
                        f"row {row}: {len(stored)} tokens stored, {len(fresh)} when computed again"
                    )
                elif len(stored):
                    # As a model sees them: clamped, as the smaller storages are.
                    pair = (
                        standardise(states, shared.mean, shared.deviation)
                        for states in (stored, fresh.cpu())
                    )
                    error = torch.sub(*pair).square().mean().sqrt().item()
                    if not error < allowed:
                        reason = f"row {row}: differs by {error:.3f} deviations when computed again"
                if reason:
                    remedy = (
                        "the encoder on this machine is not the one of the family, or the "
                        "unit is wrong"
                    )
                    self.report.problems.append(
                        Problem(where, reason, remedy, ("text", family.directory), unit)
                    )


def _recorded(reference: Mapping[str, Any]) -> FileDigest:
    """The file that a manifest or a table names."""
    return FileDigest(reference["file"], reference["bytes"], reference["sha256"])


def _unreasonable(file: TextFile | LatentFile, table: pa.Table) -> str | None:
    """Why values cannot be what an encoder computed."""
    if isinstance(file, LatentFile):
        tensors = [tensor for column in file.columns.values() for tensor in column]
        return (
            None
            if all(torch.isfinite(tensor.float()).all() for tensor in tensors)
            else "values that are not finite"
        )
    storage = file.layout.storage
    for row in range(0 if storage == "coded" else file.rows):
        values, scale = file.stored(row)
        values = values.view(torch.bfloat16) if storage == "bfloat16" else values
        if values.is_floating_point() and not torch.isfinite(values).all():
            return "values that are not finite"
        if scale is not None and not (torch.isfinite(scale).all() and (scale >= 0).all()):
            return "scales that are not finite"
    if [len(ids) for ids in table["token_ids"].to_pylist()] != table["tokens"].to_pylist():
        return "token ids do not fit the token counts"
    try:
        file.check(range(file.rows))
    except InputError as error:
        return str(error).removeprefix(f"{file.where}: ")
    return None


def _spread_rows(family: TextFamily, count: int) -> Iterator[tuple[int, list[int]]]:
    """The same rows every time, spread over the corpus."""
    # the rows of all units one after the other
    ends = np.cumsum(family.records["rows"].to_numpy(), dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    chosen: dict[int, list[int]] = {}
    for place in random.Random(0).sample(range(total), min(count, total)):
        unit = int(np.searchsorted(ends, place, side="right"))
        chosen.setdefault(unit, []).append(place - (int(ends[unit - 1]) if unit else 0))
    yield from sorted((unit, sorted(found)) for unit, found in chosen.items())
