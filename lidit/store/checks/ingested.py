"""What ingest wrote: the tables of units and sources, samples, captions, quarantines."""

from __future__ import annotations

import pyarrow as pa

from lidit.store.checks.files import FileChecker, recorded
from lidit.store.checks.report import Problem
from lidit.store.corpus import INGEST_ANEW
from lidit.store.files.atomic import FileDigest
from lidit.store.samples import caption_digest


def check_ingested(checker: FileChecker) -> bool:
    """Check everything but the families; False where the unit table is lost, without which they
    mean nothing.
    """
    folder = checker.corpus.folder
    remedy = INGEST_ANEW
    checker.expect(2)
    contents = {}
    for table_name in ("units", "sources"):
        contents[table_name] = checker.file(
            folder, recorded(checker.corpus.facts[table_name]), remedy
        )
    if contents["units"] is None:
        return False
    rows = checker.corpus.units.to_pylist()
    checker.expect(2 * len(rows))
    for row in rows:
        tables = {}
        for group in ("samples", "captions"):
            name = f"{group}/{checker.corpus.unit_name(row['unit'])}.arrow"
            content = checker.file(
                folder, FileDigest(name, row[f"{group}_bytes"], row[f"{group}_sha256"]), remedy
            )
            table = checker.arrow(content, folder.where(name), row[group], remedy)
            if table is not None:
                tables[group] = table
        if checker.deep and len(tables) == 2:
            _check_unit(checker, row["unit"], tables["samples"], tables["captions"], remedy)
    if contents["sources"] is not None and "quarantine" in checker.corpus.sources.schema.names:
        quarantines = [row for row in checker.corpus.sources.to_pylist() if row["quarantine"]]
        checker.expect(len(quarantines))
        for row in quarantines:
            name = f"quarantine/{row['quarantine']}"
            checker.file(
                folder,
                FileDigest(name, row["quarantine_bytes"], row["quarantine_sha256"]),
                remedy,
            )
    return True


def _check_unit(
    checker: FileChecker, unit: int, samples: pa.Table, captions: pa.Table, remedy: str
) -> None:
    name = checker.corpus.unit_name(unit)
    for text, digest in zip(
        captions["text"].to_pylist(), captions["sha256"].to_pylist(), strict=True
    ):
        if caption_digest(text) != digest:
            where = checker.corpus.folder.where(f"captions/{name}.arrow")
            checker.report.problems.append(
                Problem(where, f"sha256 of caption {text[:40]!r} differs", remedy)
            )
    indices = [reference["index"] for row in samples["captions"].to_pylist() for reference in row]
    if set(indices) != set(range(captions.num_rows)):
        where = checker.corpus.folder.where(f"samples/{name}.arrow")
        checker.report.problems.append(
            Problem(where, "caption indices do not fit the captions", remedy)
        )
