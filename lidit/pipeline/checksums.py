"""A model folder's checksums: which bytes were saved, and whether they are still those.

A flipped bit in a weight draws pictures that look almost right; nothing else would tell.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lidit.config.json_object import read_object
from lidit.errors import InputError, one_line

CHECKSUMS = "checksums.json"
# ten seconds of one core; larger folders are checked when asked for
CHECKED_BELOW_BYTES = 20_000_000_000
# What is written after the model or by its owner: the step it ended at, this list itself, MLflow's
# examples.
LEFT_OUT = {"finished.json", CHECKSUMS, "input_example.json", "serving_input_example.json"}
SUFFIXES = {".safetensors", ".json"}


def write_checksums(folder: Path) -> None:
    """Note size and sha256 of every weight and settings file of a model folder; call after the last
    of them.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for name, path in _files(folder).items()
    }
    (folder / CHECKSUMS).write_text(json.dumps(files, indent=1, sort_keys=True) + "\n")


def check_model(folder: Path, check: bool | None = None) -> int | None:
    """The number of files found to be as they were saved; None where the folder has no checksums or
    none is wanted.

    check: None for folders below 20 GB only. Raises InputError, naming the file, where one is
    missing or changed, and where a weight or settings file is there that was not saved with the
    others.
    """
    if check is False or not (folder / CHECKSUMS).is_file():
        return None
    recorded, found = _recorded(folder), _files(folder)
    if check is None and sum(size for size, _ in recorded.values()) >= CHECKED_BELOW_BYTES:
        return None
    remedy = f"copy the model folder again (or delete {CHECKSUMS} if you changed the file yourself)"
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            raise InputError(f"{folder / name}: missing, it was saved with the model; {remedy}")
        if name not in recorded:
            raise InputError(f"{folder / name}: was not saved with the model; {remedy}")
        size, sha256 = recorded[name]
        if found[name].stat().st_size != size or _digest(found[name]) != sha256:
            raise InputError(
                f"{folder / name}: damaged, its bytes are not those that were saved; {remedy}"
            )
    return len(recorded)


def _recorded(folder: Path) -> dict[str, tuple[int, str]]:
    path, again = folder / CHECKSUMS, "copy the model folder again"
    entries = read_object(path, again)
    try:
        return {
            name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()
        }
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); {again}") from None


def _files(folder: Path) -> dict[str, Path]:
    """Weight and settings files by their place in the folder; hidden folders, such as a download's,
    are not its own.
    """
    found = {
        path.relative_to(folder): path for path in folder.rglob("*") if path.suffix in SUFFIXES
    }
    return {
        place.as_posix(): path
        for place, path in found.items()
        if path.is_file()
        and place.as_posix() not in LEFT_OUT
        and not any(p.startswith(".") for p in place.parts)
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
