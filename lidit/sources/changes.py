"""Are a corpus's sources still what was ingested? Every source file against its sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lidit.sources.base import FieldNames, OpenedSource, SourceFile
from lidit.sources.image_folder import read_folder
from lidit.store import Corpus
from lidit.store.files.folder import is_url

_OF_NOTHING = hashlib.sha256().hexdigest()


def compare_sources(corpus: Corpus) -> Iterator[tuple[str, str | None]]:
    """(path, what is wrong with it or None) of each source file, or folder of images. Reads all of
    every one.

    Pictures that a table or a text file names are in files of their own, of which no sha256 is
    known: nothing is said about them here, and when they are encoded only their sizes are compared.
    """
    for row in corpus.sources.to_pylist():
        path = corpus.image_path(row["file"]).rstrip("/")
        if _unread(path, row):
            yield path, None
            continue
        try:
            found = _sha256(path, row["file"])
        except OSError as error:
            yield path, f"cannot be read: {error}"
            continue
        yield (
            path,
            None
            if found == row["sha256"]
            else "other contents than were ingested (sha256 differs)",
        )


def _unread(path: str, row: dict[str, Any]) -> bool:
    """Whether an ingest refused to open a file (a pipe, a link that leads nowhere or out of its
    folder) and nothing has become of it since."""
    if row["sha256"] != _OF_NOTHING or row["samples"] or is_url(path):
        return False
    return row["bytes"] > 0 or not (Path(path).is_file() or Path(path).is_dir())


def _sha256(path: str, name: str) -> str:
    opened = OpenedSource(SourceFile("", path, name, 0, ""))
    if is_url(path) or not Path(path).is_dir():
        with opened.stream():
            opened.finish()
    else:
        for _ in read_folder(opened, FieldNames({}, (), captions_only=False)):
            pass
    return opened.sha256_read
