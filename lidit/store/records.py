"""Commit records: one small JSON file per finished unit, and the table of all of them that a
manifest names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import torch

from lidit.store.coding.transform import StateCode
from lidit.store.loss import StorageLoss, storage_loss
from lidit.store.schema import RECORDS, ROW_INDEX, digest_of, seal, unseal
from lidit.store.states import value_range

Content = bytes  # the class below has a field of that name


@dataclass(frozen=True)
class CommitRecord:
    """One finished unit: its data file, what is in it and how it came to be.

    minimum and maximum are over the values before storage; shared is the sha256 of the shared.arrow
    the unit was made with; of the sha256 of the unit's captions or samples file, from which it was
    made (None in the records of the first release); error are the sums of `StorageLoss`; counts are
    numbers a job wants added up, such as truncated captions; index says where rows lie
    (`row_index.positions`), None in files that are read as a whole.
    """

    unit: int
    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str
    seconds: float
    minimum: float
    maximum: float
    shared: str | None = None
    error: dict[str, float] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    of: str | None = None
    index: list[list[int]] | None = None

    def to_json(self) -> Content:
        facts = asdict(self)
        if self.index is None:
            del facts["index"]
        return seal(facts)

    @classmethod
    def from_json(cls, content: Content) -> CommitRecord | None:
        """None where the bytes are no whole record: such a unit counts as not computed."""
        try:
            return cls(**unseal(content))
        except (ValueError, TypeError):
            return None


@dataclass
class UnitStatistics:
    """What a writer learns about a unit's values while it makes them; filled table by table."""

    minimum: float = math.inf
    maximum: float = -math.inf
    error: StorageLoss | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        values: Sequence[torch.Tensor],
        table: pa.Table | None = None,
        mean: torch.Tensor | None = None,
        deviation: torch.Tensor | None = None,
        counts: dict[str, int] | None = None,
        code: StateCode | None = None,
    ) -> None:
        """Take in one table's tensors; with table, mean and deviation the storage error is measured
        too.
        """
        if any(v.numel() for v in values):
            low, high = value_range(values)
            self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if table is not None and mean is not None and deviation is not None:
            measured = storage_loss(values, table, mean, deviation, code)
            self.error = measured if self.error is None else self.error + measured
        for name, number in (counts or {}).items():
            self.counts[name] = self.counts.get(name, 0) + number

    @property
    def range(self) -> tuple[float, float]:
        return (self.minimum, self.maximum) if self.minimum <= self.maximum else (0.0, 0.0)


def records_table(records: Sequence[CommitRecord]) -> pa.Table:
    """The manifest's table, ordered by unit."""
    ordered = sorted(records, key=lambda record: record.unit)
    schema = (
        RECORDS if all(record.index is None for record in records) else RECORDS.append(ROW_INDEX)
    )
    return pa.Table.from_arrays(
        [
            pa.array([getattr(record, column.name) for record in ordered], column.type)
            for column in schema
        ],
        schema=schema,
    )


def totals(records: Sequence[CommitRecord]) -> dict[str, Any]:
    """The sums and extremes a manifest states, and the storage error over all units that measured
    it.
    """
    measured = [StorageLoss(**record.error) for record in records if record.error]  # type: ignore[arg-type]
    counts: dict[str, int] = {}
    for record in records:
        for name, number in record.counts.items():
            counts[name] = counts.get(name, 0) + number
    facts: dict[str, Any] = {
        "units": len(records),
        "rows": sum(record.rows for record in records),
        "tokens": sum(record.tokens for record in records),
        "bytes": sum(record.bytes for record in records),
        "seconds": sum(record.seconds for record in records),
        "minimum": min((record.minimum for record in records), default=0.0),
        "maximum": max((record.maximum for record in records), default=0.0),
        "counts": counts,
    }
    if measured:
        error = measured[0]
        for other in measured[1:]:
            error += other
        facts["storage_error"] = {
            "standardised_rms": error.standardised_rms,
            "centred_cosine": error.centred_cosine,
            "lowest_centred_cosine": error.lowest_cosine,
        }
        if error.worst:
            facts["storage_error"]["worst_token"] = error.worst
    return facts


def family_digest(fingerprint: str, shared: str | None, records: pa.Table) -> str:
    """The identity of a family's contents: its spec and every byte of its data, but not how long
    that took.
    """
    assert records.schema.names[: len(RECORDS)] == RECORDS.names
    units = [
        [unit, sha256]
        for unit, sha256 in zip(*(records[c].to_pylist() for c in ("unit", "sha256")), strict=True)
    ]
    return digest_of({"fingerprint": fingerprint, "shared": shared, "units": units})
