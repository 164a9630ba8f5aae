"""How the JSON files of a store name other files and describe families; what corpus, families and
writers share.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lidit.errors import InputError
from lidit.store.files.atomic import FileDigest
from lidit.store.files.folder import Folder

FAMILY_FILE = "family.json"
MANIFEST_FILE = "MANIFEST.json"
ROLLING_FILE = "ROLLING.json"  # of a rolling family, in place of a manifest


@dataclass(frozen=True)
class FamilyHandle:
    """A family's directory as it stands, complete or not. rolling: its units come and go
    (`store.rolling`).
    """

    kind: str
    directory: str
    name: str
    fingerprint: str
    spec: dict[str, Any]
    complete: bool
    rolling: bool = False


def spec_differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Readable differences of two JSON values, one line per leaf: `key.path: a -> b`."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(set(one) | set(other))
        return [
            line
            for key in keys
            for line in spec_differences(
                one.get(key), other.get(key), f"{path}.{key}" if path else str(key)
            )
        ]
    return [] if one == other else [f"{path}: {json.dumps(one)} -> {json.dumps(other)}"]


def named(file: FileDigest) -> dict[str, Any]:
    """How a JSON file names another file: name, size, sha256."""
    return {"file": file.name, "bytes": file.bytes, "sha256": file.sha256}


def read_named_table(folder: Folder, reference: dict[str, Any]) -> pa.Table:
    """The Arrow table that a JSON file names, after checking its bytes. InputError where they
    differ.
    """
    where = folder.where(reference["file"])
    try:
        content = folder.map(reference["file"])
    except FileNotFoundError:
        raise InputError(f"{where}: missing; run lidit verify") from None
    if hashlib.sha256(content).hexdigest() != reference["sha256"]:
        raise InputError(
            f"{where}: the bytes are not those that were written (sha256 differs); run lidit verify"
        )
    return pa.ipc.open_file(pa.py_buffer(content)).read_all()
