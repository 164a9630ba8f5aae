"""Small real corpora for tests that start after ingest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from lidit.store import Corpus, Sample, publish_corpus, publish_unit, unit_tables
from lidit.store.files.folder import Folder

WORDS = (
    "a red circle",
    "a blue square left of a green star",
    "",
    "两只猫坐在沙发上",
    "naïve café",
    "x",
)


def make_corpus(
    path: Path | str, units: Sequence[Sequence[str]], settings: dict | None = None, digits: int = 5
) -> Corpus:
    """A captions-only corpus: one sample per caption, one inner sequence per unit. digits: of unit
    numbers in names.
    """
    folder = Folder.at(path)
    rows = []
    for unit, captions in enumerate(units):
        samples = [Sample(f"{unit}-{i}", ((text, "original"),)) for i, text in enumerate(captions)]
        rows.append(publish_unit(folder, unit, digits, f"{unit}.txt", *unit_tables(samples)))
    sources = pa.table({"file": [f"{u}.txt" for u in range(len(units))]})
    return publish_corpus(folder, rows, digits, "/nowhere", sources, settings or {}, {"refused": 0})
