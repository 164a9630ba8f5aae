"""A family against its manifest, its records, the corpus it was made for."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch

from lidit.errors import InputError
from lidit.store.checks.files import FamilyName, FileChecker, recorded
from lidit.store.checks.report import Problem
from lidit.store.files.atomic import FileDigest
from lidit.store.files.folder import Folder
from lidit.store.latent_file import LatentFile
from lidit.store.manifest import FAMILY_FILE, MANIFEST_FILE, ROLLING_FILE
from lidit.store.records import CommitRecord
from lidit.store.schema import digest_of, unseal
from lidit.store.text_file import TextFile
from lidit.store.writer import ALIGNED_WITH

JOBS = {"text": "embed", "latents": "latents"}


def check_family(checker: FileChecker, kind: str, directory: str) -> None:
    """Check a family's manifest, its tables and every unit's file."""
    folder = checker.corpus.folder.child(kind).child(directory)
    family = (kind, directory)
    remedy = f"run lidit repair, then lidit {JOBS[kind]} to compute what is missing"
    if not folder.exists(MANIFEST_FILE) and folder.exists(ROLLING_FILE):
        _check_rolling(checker, folder, family, remedy)
        return
    facts, manifest = (
        _sealed(checker, folder, name, family, remedy) for name in (FAMILY_FILE, MANIFEST_FILE)
    )
    if facts is None or manifest is None:
        return
    if _foreign(checker, folder, family, facts, manifest, remedy):
        return
    shared, table = manifest["shared"], manifest["records"]
    checker.expect(1 if shared is None else 2)
    if shared is not None:
        checker.file(folder, recorded(shared), remedy, family)
    if checker.file(folder, recorded(table), remedy, family) is None:
        return
    records = folder.read_table(table["file"]).to_pylist()
    if [record["unit"] for record in records] != list(range(checker.corpus.num_units)):
        where = folder.where(table["file"])
        checker.report.problems.append(
            Problem(where, "does not list every unit once", remedy, family)
        )
    checker.expect(len(records))
    for record in records:
        _check_unit(checker, folder, family, record, manifest, remedy)


def _check_rolling(checker: FileChecker, folder: Folder, family: FamilyName, remedy: str) -> None:
    """A rolling family: the units that are there, each against its own record."""
    facts, manifest = (
        _sealed(checker, folder, name, family, remedy) for name in (FAMILY_FILE, ROLLING_FILE)
    )
    if (
        facts is None
        or manifest is None
        or _foreign(checker, folder, family, facts, manifest, remedy)
    ):
        return
    checker.file(folder, recorded(manifest["shared"]), remedy, family)
    names = {
        f"{checker.corpus.unit_name(unit)}.json": unit for unit in range(checker.corpus.num_units)
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
            checker.report.problems.append(problem)
            continue
        there += 1
        checker.file(
            folder,
            FileDigest(record.file, record.bytes, record.sha256),
            remedy,
            family,
            record.unit,
        )
    checker.report.notes.append(
        f"{folder.location}: rolling, {there} of {checker.corpus.num_units} units are there"
    )


def _sealed(
    checker: FileChecker, folder: Folder, name: str, family: FamilyName, remedy: str
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
            checker.report.notes.append(f"{folder.location}: unfinished; {job} goes on with it")
        elif folder.sizes():
            checker.report.problems.append(Problem(where, "missing", remedy, family))
    except IsADirectoryError:
        remedy = f"delete this folder, then {remedy}"
        checker.report.problems.append(Problem(where, "is a folder, not a file", remedy, family))
    except ValueError:
        checker.report.problems.append(Problem(where, "damaged", remedy, family))
    return None


def _foreign(
    checker: FileChecker,
    folder: Folder,
    family: FamilyName,
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
        if content.get("corpus") != checker.corpus.digest:
            problems.append((name, "was made for another corpus"))
    for name, reason in problems:
        checker.report.problems.append(Problem(folder.where(name), reason, remedy, family))
    return bool(problems)


def _check_unit(
    checker: FileChecker,
    folder: Folder,
    family: FamilyName,
    record: dict[str, Any],
    manifest: dict[str, Any],
    remedy: str,
) -> None:
    unit, where = record["unit"], folder.where(record["file"])

    def problem(file: str, reason: str) -> None:
        checker.report.problems.append(Problem(file, reason, remedy, family, unit))

    name = f"{checker.corpus.unit_name(unit)}.json"
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
    elif commit.of not in (None, checker.corpus.digest_of_unit(ALIGNED_WITH[family[0]], unit)):
        problem(where, f"was made from other {ALIGNED_WITH[family[0]]} than the corpus has")
    content = checker.file(folder, recorded(record), remedy, family, unit)
    table = checker.arrow(content, where, record["rows"], remedy, family, unit)
    if table is None or content is None:
        return
    group = ALIGNED_WITH[family[0]]
    if table.num_rows != checker.corpus.units[group][unit].as_py():
        problem(
            where,
            f"{table.num_rows} rows, but the unit has {checker.corpus.units[group][unit]} {group}",
        )
        return
    try:
        file = (TextFile if family[0] == "text" else LatentFile).load(bytearray(content), where)
    except InputError as error:
        problem(where, str(error).removeprefix(f"{where}: "))
        return
    if checker.deep and (reason := _unreasonable(file, table)):
        problem(where, reason)


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
