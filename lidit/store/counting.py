"""Counts what a unit's tables hold while they pass through to its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc


class Counter:
    """Passes tables through and counts their rows and tokens (latents: spatial positions)."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self.tables, self.rows, self.tokens = tables, 0, 0

    def __iter__(self) -> Iterator[pa.Table]:
        for table in self.tables:
            self.rows += table.num_rows
            self.tokens += int(pc.sum(table["tokens"]).as_py() or 0)
            yield table
