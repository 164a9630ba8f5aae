"""Take away what `verify` found bad in families, so that the next `lidit embed` or `latents`
computes just that.
"""

from __future__ import annotations

from collections.abc import Sequence

from lidit.store.checks.report import Problem
from lidit.store.files.folder import Folder
from lidit.store.manifest import FAMILY_FILE, MANIFEST_FILE
from lidit.store.writer import SHARED_FILE


def repair_corpus(path: str, problems: Sequence[Problem]) -> list[str]:
    """Delete what is bad; returns the files removed. What ingest wrote is never deleted: it cannot
    be computed again.

    The manifest goes first, so that no reader accepts a family while pieces of it are missing.
    Without its spec or its shared states nothing in a family can be trusted, and all of it goes.
    """
    corpus = Folder.at(path)
    removed: list[str] = []
    for kind, directory in sorted({problem.family for problem in problems if problem.family}):
        folder = corpus.child(kind).child(directory)
        ours = [problem for problem in problems if problem.family == (kind, directory)]
        bad = {problem.file for problem in ours}
        doomed = [MANIFEST_FILE, *(name for name in folder.sizes() if name.startswith("MANIFEST-"))]
        if bad & {folder.where(FAMILY_FILE), folder.where(SHARED_FILE)}:
            doomed += [name for name in sorted(folder.sizes()) if name != FAMILY_FILE]
            if folder.where(FAMILY_FILE) in bad:
                doomed.append(FAMILY_FILE)
        else:
            units = {problem.unit for problem in ours if problem.unit is not None}
            doomed += [
                name for name in sorted(folder.sizes(), reverse=True) if _unit_of(name) in units
            ]
        for name in dict.fromkeys(doomed):
            if folder.exists(name):
                folder.remove(name)
                removed.append(folder.where(name))
    return removed


def _unit_of(name: str) -> int | None:
    """00012.json and 00012-0123456789ab.arrow belong to unit 12."""
    number = name.partition(".")[0].partition("-")[0]
    return int(number) if number.isdigit() else None
