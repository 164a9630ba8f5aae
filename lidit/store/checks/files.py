"""One file against what names it: there, of its size, of its sha256, a valid Arrow file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from lidit.errors import one_line
from lidit.progress import Progress
from lidit.store.checks.report import Problem, VerifyReport
from lidit.store.corpus import Corpus
from lidit.store.files.atomic import FileDigest
from lidit.store.files.folder import Folder

FamilyName = tuple[str, str]  # kind, directory


class FileChecker:
    """Checks files of one corpus and keeps the report. deep: whether values are looked at too."""

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

    def expect(self, files: int) -> None:
        self.expected += files
        self.progress.expect(self.expected)

    def arrow(
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


def recorded(reference: Mapping[str, Any]) -> FileDigest:
    """The file that a manifest or a table names."""
    return FileDigest(reference["file"], reference["bytes"], reference["sha256"])
