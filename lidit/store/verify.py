"""Is a corpus what was written? Every file against what names it; deep: every value and alignment,
some rows anew.
"""

from __future__ import annotations

from lidit.progress import SILENT, Progress
from lidit.store.checks.again import Encode, encode_again
from lidit.store.checks.families import check_family
from lidit.store.checks.files import FileChecker
from lidit.store.checks.ingested import check_ingested
from lidit.store.checks.report import VerifyReport
from lidit.store.corpus import Corpus
from lidit.store.writer import ALIGNED_WITH


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
    checker = FileChecker(Corpus.open(path), deep, progress)
    if not check_ingested(checker):
        return checker.report
    for kind in ALIGNED_WITH:
        for directory in checker.corpus.folder.child(kind).folders():
            check_family(checker, kind, directory)
    report = checker.report
    if encode is not None and report.sound:
        for handle in checker.corpus.text_families():
            if handle.complete:
                encode_again(
                    checker, checker.corpus.text_family(handle.directory), encode, encode_rows
                )
    return report
