"""The writer's side of a rolling family: announcing it, deleting units, remembering what was
deleted.

A unit is deleted record first: from then on it does not exist, and a file that a kill leaves behind
is an orphan like every dead writer's. Its record is kept aside before, so that a later computation
with other bits is noticed.
"""

from __future__ import annotations

import contextlib
from typing import Any

from lidit.errors import JobError
from lidit.store.files.atomic import crash_point, publish_bytes
from lidit.store.manifest import ROLLING_FILE
from lidit.store.records import CommitRecord
from lidit.store.rolling import DELETED
from lidit.store.schema import FORMAT_VERSION, digest_of, seal
from lidit.store.writer import SHARED_FILE, FamilyWriter


def announce_rolling(writer: FamilyWriter, patience: float, extra: dict[str, Any]) -> None:
    """Write ROLLING.json: from now on readers accept the family and wait for its units.

    extra: what a manifest's would be. JobError without shared states, of which every unit is made.
    """
    shared = writer.shared_sha256
    if shared is None:
        raise JobError(
            f"{writer.folder.location}: no shared states yet; a rolling family is announced "
            "after them"
        )
    facts = {
        "format": FORMAT_VERSION,
        "kind": writer.kind,
        "name": writer.name,
        "fingerprint": writer.fingerprint,
        "corpus": writer.corpus.digest,
        # Of what never changes: the spec and the shared states. Single units come and go.
        "digest": digest_of(
            {"fingerprint": writer.fingerprint, "shared": shared, "corpus": writer.corpus.digest}
        ),
        "shared": {"file": SHARED_FILE, "bytes": writer.folder.size(SHARED_FILE), "sha256": shared},
        "unit_digits": writer.corpus.digits,
        "patience": patience,
        "extra": extra,
    }
    publish_bytes(writer.folder, ROLLING_FILE, seal(facts))
    crash_point("rolling-announced")


def delete_unit(writer: FamilyWriter, unit: int) -> None:
    """Delete a unit's record and file; its first record stays in the folder `deleted`."""
    name = f"{writer.corpus.unit_name(unit)}.json"
    record = writer.committed(unit)
    if record is None:
        return
    aside = writer.folder.child(DELETED)
    if first_record(writer, unit) is None:
        aside.create()
        # A disk so full that it has no room for a record gets room by what follows.
        with contextlib.suppress(JobError):
            publish_bytes(aside, name, record.to_json())
    crash_point("record-kept")
    writer.folder.remove(name)
    crash_point("record-deleted")
    writer.folder.remove(record.file)
    crash_point("data-deleted")


def first_record(writer: FamilyWriter, unit: int) -> CommitRecord | None:
    """The record of a unit's first computation, once it was deleted."""
    aside = writer.folder.child(DELETED)
    try:
        return CommitRecord.from_json(aside.read_bytes(f"{writer.corpus.unit_name(unit)}.json"))
    except FileNotFoundError:
        return None
