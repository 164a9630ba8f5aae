"""From what a person types (files, folders, globs, URLs) to an ordered list of source files."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from lidit.errors import InputError
from lidit.images.decode import SUFFIXES
from lidit.sources.base import SourceFile
from lidit.store.files.folder import is_url, open_url
from lidit.store.files.remote import plain_refusals
from lidit.store.samples import printable

# In a folder the first kind found is taken: a .parquet or .json beside tars describes them, as img2dataset does.
KINDS = {
    "tar": (".tar", ".tar.gz", ".tgz"),
    "table": (".parquet", ".pq", ".arrow", ".feather", ".ipc"),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "text": (".txt",),
}
FOLDER = "folder"


def expand(sources: Sequence[str]) -> tuple[str, list[SourceFile]]:
    """The common root and every source file below it, in order of path; a file named twice counts once.

    Raises InputError for a source that does not exist, matches nothing, is of no known kind or has no name in UTF-8.
    """
    found: dict[str, tuple[str, int, str]] = {}
    for source in sources:
        for pattern in _patterns(source):
            matches = _remote(pattern) if is_url(pattern) else _local(pattern)
            if not matches:
                raise InputError(f"{pattern}: nothing here to ingest; expected {_expected()}")
            found |= matches
    if not found:
        raise InputError("no source given")
    paths = sorted(found)
    if unnamable := next((path for path in paths if printable(path) != path), None):
        raise InputError(f"{printable(unnamable)}: this name is not UTF-8, a corpus cannot note it; rename it")
    if len({is_url(path) for path in paths}) > 1:
        raise InputError("sources: local files and URLs cannot be one corpus; ingest them separately")
    root = _root(paths, found)
    files = [
        SourceFile(kind, path, path[len(root) + 1 :], size, modified)
        for path in paths
        for kind, size, modified in [found[path]]
    ]
    return root, files


def _patterns(source: str) -> list[str]:
    if "{" not in source:
        return [source]
    try:
        return list(braceexpand(source))
    except ValueError:
        raise InputError(f"{source}: a brace without its other one; write data/{{00..41}}.tar, or * instead") from None


def _expected() -> str:
    return f"{', '.join(s for suffixes in KINDS.values() for s in suffixes)} or a folder of images"


def kind_of(path: str) -> str | None:
    """The kind of reader a file name asks for."""
    lower = path.lower()
    return next((kind for kind, suffixes in KINDS.items() if lower.endswith(suffixes)), None)


def _first_kind(paths: Sequence[str]) -> tuple[str, list[str]] | None:
    for kind in KINDS:
        of_kind = [path for path in paths if kind_of(path) == kind]
        if of_kind:
            return kind, of_kind
    return None


def _local(pattern: str) -> dict[str, tuple[str, int, str]]:
    path = Path(pattern.removeprefix("file://")).expanduser().absolute()
    if path.exists():
        paths = [path]
    elif glob.has_magic(pattern):
        paths = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207  (** and sorted below)
    else:
        raise InputError(f"{pattern}: no such file or folder")
    found: dict[str, tuple[str, int, str]] = {}
    for match in paths:
        if match.is_dir():
            found |= _local_folder(match)
        elif kind := kind_of(match.name):
            found[str(match)] = (kind, match.stat().st_size, str(match.stat().st_mtime_ns))
        elif not glob.has_magic(pattern):
            raise InputError(f"{match}: unknown kind of source; expected {_expected()}")
    return found


def _local_folder(folder: Path) -> dict[str, tuple[str, int, str]]:
    files = [Path(top, name) for top, _, names in os.walk(folder) for name in names]
    images = [file for file in files if file.suffix.lower().lstrip(".") in SUFFIXES]
    chosen = _first_kind([str(file) for file in files])
    if images and (chosen is None or chosen[0] == "text"):
        found = {}
        for parent in sorted({image.parent for image in images}):
            members = sorted(p for p in parent.iterdir() if p.is_file())
            size = sum(member.stat().st_size for member in members)
            newest = max((member.stat().st_mtime_ns for member in members), default=0)
            found[str(parent)] = (FOLDER, size, str(newest))
        return found
    if chosen is None:
        return {}
    kind, names = chosen
    return {name: (kind, Path(name).stat().st_size, str(Path(name).stat().st_mtime_ns)) for name in names}


def _remote(pattern: str) -> dict[str, tuple[str, int, str]]:
    file_system, path = open_url(pattern)
    protocol = pattern.split("://", 1)[0]
    try:
        with plain_refusals(pattern):
            if glob.has_magic(path):
                entries = file_system.glob(path, detail=True)
            elif file_system.isfile(path):
                entries = {path: file_system.info(path)}
            else:
                entries = file_system.find(path, detail=True)
    except FileNotFoundError as error:
        raise InputError(f"{pattern}: cannot be read: {error}") from None
    sizes: dict[str, Any] = {f"{protocol}://{name.lstrip('/')}": info for name, info in entries.items()}
    chosen = _first_kind([name for name, info in sizes.items() if info["type"] == "file"])
    if chosen is None:
        return {}
    kind, names = chosen
    return {name: (kind, int(sizes[name]["size"]), _version(sizes[name])) for name in names}


def _version(info: dict[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or "")


def _root(paths: Sequence[str], found: dict[str, tuple[str, int, str]]) -> str:
    # A folder of images is its own root when it is the only source, so that names never depend on where it lies.
    parents = [path if found[path][0] == FOLDER else path.rpartition("/")[0] for path in paths]
    parts = [parent.split("/") for parent in parents]
    common = []
    for step in zip(*parts, strict=False):
        if len(set(step)) > 1:
            break
        common.append(step[0])
    return "/".join(common)
