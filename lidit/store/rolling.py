"""A rolling family: units that are computed shortly before they are read, and may be deleted
afterwards.

It has ROLLING.json in place of a manifest. Unit files, commit records and checksums are those of
every family; a reader that comes too early waits for the unit's record.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from functools import cached_property
from typing import Any

import pyarrow as pa

from lidit.errors import InputError, JobError
from lidit.store.families import TextFamily
from lidit.store.manifest import ROLLING_FILE
from lidit.store.records import CommitRecord
from lidit.store.schema import unit_name, unseal

READERS = "readers"  # folder: one sealed file per reader, its credit
DELETED = "deleted"  # folder: the first commit record of every unit that was deleted
PRODUCER_FILE = "producer.json"  # what the producer is doing, for readers that wait
FIRST_LOOK_SECONDS, SLOWEST_LOOK_SECONDS = 0.02, 1.0


class RollingTextFamily(TextFamily):
    """States that a producer computes while they are read. Opened by
    `Corpus.text_family(..., rolling=True)`.

    Whatever reads a unit waits until it is there, for at most the family's patience.
    """

    _manifest_file = ROLLING_FILE

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.patience = float(self.manifest["patience"])
        self._known: dict[int, dict[str, Any]] = {}
        self._leaving = threading.Event()
        self._alone: dict[int, threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("_leaving", "_alone")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._leaving, self._alone = threading.Event(), {}

    @cached_property
    def records(self) -> pa.Table:
        raise InputError(
            f"{self.folder.location}: a rolling family has no table of all units; compute them "
            "all with lidit embed"
        )

    def stop_waiting(self, stop: bool = True) -> None:
        """Make readers that wait raise JobError at once, and those to come; `stop=False` takes it
        back.
        """
        if stop:
            self._leaving.set()
        else:
            self._leaving.clear()

    def record(self, unit: int) -> dict[str, Any]:
        """The commit record of one unit, waited for.

        Args:
            unit: Number of the unit, from 0.

        Returns:
            The record as a dictionary.

        Raises:
            InputError: No such unit.
            JobError: The unit was not computed within the family's patience, or its producer
                failed.
        """
        if not 0 <= unit < self.num_units:
            raise InputError(
                f"{self.folder.location}: no unit {unit}; there are {self.num_units}, from 0"
            )
        record = self._known.get(unit)
        if record is None:
            record = self._known[unit] = self._wait(unit)
        return record

    def verify_unit(self, unit: int) -> None:
        """Wait for a unit's file, check its size and sha256, and open it; it stays checked while it
        is open.

        Args:
            unit: Number of the unit, from 0.

        Raises:
            InputError: The file is damaged.
            JobError: As `record`.
        """
        self._open(unit)

    def _open(self, unit: int) -> Any:
        if (opened := self._opened(unit)) is not None:
            return opened
        # A lock of the unit's own: who waits for one unit must not hold up readers of another.
        with self._lock:
            alone = self._alone.setdefault(unit, threading.Lock())
        with alone:
            if (opened := self._opened(unit)) is not None:
                return opened
            # Since it was last open the unit may have been deleted and computed again, elsewhere
            # even with other bits.
            self._known.pop(unit, None)
            while (problem := self._problem(self.record(unit))) == "missing":
                # Deleted between its record and its file: nobody knew of this reader. It is
                # computed again.
                self._known.pop(unit, None)
            if problem is not None:
                raise InputError(
                    f"{self.folder.where(self.record(unit)['file'])}: {problem}; {self._remedy}"
                )
            self._let_go()
            return super()._open(unit)

    def _opened(self, unit: int) -> Any:
        with self._lock:
            if unit in self._files:
                self._files.move_to_end(unit)
            return self._files.get(unit)

    def _let_go(self) -> None:
        """Close files that were deleted: a disk keeps their bytes as long as somebody maps them."""
        if not self.folder.local:
            return
        with self._lock:
            for unit in list(self._files):
                known = self._known.get(unit)
                if known is None or self.folder.size(known["file"]) is None:
                    del self._files[unit]

    def _wait(self, unit: int) -> dict[str, Any]:
        name = f"{unit_name(unit, self.manifest['unit_digits'])}.json"
        deadline, pause = time.monotonic() + self.patience, FIRST_LOOK_SECONDS
        while (record := self._look(name)) is None:
            if reason := self._producer().get("failed"):
                raise JobError(
                    f"{self.folder.location}: unit {unit} will not come, its producer "
                    f"failed: {reason}"
                )
            if time.monotonic() > deadline:
                raise JobError(f"{self.folder.location}: {self._overdue(unit)}")
            if self._leaving.wait(pause):
                raise JobError(f"{self.folder.location}: unit {unit} is no longer waited for")
            pause = min(1.5 * pause, SLOWEST_LOOK_SECONDS)
        return record

    def _look(self, name: str) -> dict[str, Any] | None:
        """A unit's record where it stands and is of the family's shared states."""
        try:
            record = CommitRecord.from_json(self.folder.read_bytes(name))
        except FileNotFoundError:
            return None
        return (
            asdict(record)
            if record and record.shared == self.manifest["shared"]["sha256"]
            else None
        )

    def _producer(self) -> dict[str, Any]:
        try:
            return unseal(self.folder.read_bytes(PRODUCER_FILE))
        except (FileNotFoundError, ValueError):
            return {}

    def _overdue(self, unit: int) -> str:
        found = self._producer()
        if not found:
            return (
                f"unit {unit} did not come within {self.patience:g} s (online.patience) and "
                "nothing computes this "
                f"family; start its producer"
            )
        return (
            f"unit {unit} did not come within {self.patience:g} s (online.patience) from its "
            "producer, process "
            f"{found['process']} on {found['host']}, whose last word is of {found['written']}; "
            "see whether it runs and "
            "keeps up, or start another"
        )
