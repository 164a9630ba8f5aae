"""From what a person types (files, folders, globs, URLs) to an ordered list of source files, and
what was left out."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from lidit.config import IngestSettings
from lidit.errors import InputError, StorageError
from lidit.images.decode import SUFFIXES
from lidit.sources.base import FieldNames, SourceFile, hidden_kind, suffix_kind
from lidit.sources.headers import PATHS, image_field
from lidit.sources.image_folder import TEXT_SUFFIXES
from lidit.sources.kinds import FOLDER, KINDS, kind_of
from lidit.sources.walk import problem_of, walk
from lidit.store.files.folder import is_url, open_url
from lidit.store.files.remote import plain_refusals
from lidit.store.samples import printable


class Expanded(NamedTuple):
    """The common root, every source file below it in order of path, and how much was left out, by
    kind.

    loose: files of images in folders whose tables or rows are to name them.
    """

    root: str
    files: list[SourceFile]
    left_out: dict[str, int]
    loose: int


@dataclass
class _Found:
    """path -> (kind of reader, bytes, version, problem); path -> kind of what is left out; images
    for rows to name."""

    taken: dict[str, tuple[str, int, str, str | None]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    loose: set[str] = field(default_factory=set)

    def take(self, path: Path, kind: str, top: Path | None = None) -> None:
        try:
            status = path.stat()
        except OSError:
            size, version = 0, ""
        else:
            size, version = status.st_size, str(status.st_mtime_ns)
        self.taken[str(path)] = (kind, size, version, problem_of(path, top))

    def leave(self, paths: Iterable[str], chosen: str) -> None:
        """Paths of other kinds than the chosen one; those that some kind of reader takes are named
        as such."""
        for path in paths:
            known = kind_of(path) is not None or _is_image(path)
            self.left[path] = f"{suffix_kind(path)} beside {chosen}" if known else suffix_kind(path)


def expand(sources: Sequence[str], fields: FieldNames | None = None) -> Expanded:
    """Every source file that `sources` name; a file named twice counts once.

    fields: which columns hold images, where a folder has tables beside its images. Raises
    InputError for a source that does not exist, matches nothing, is of no known kind or has no name
    in UTF-8.
    """
    if fields is None:
        settings = IngestSettings()
        fields = FieldNames(settings.caption_fields, settings.image_fields, settings.captions_only)
    found = _Found()
    for source in sources:
        for pattern in _patterns(source):
            matches = _Found()
            (_remote if is_url(pattern) else _local)(pattern, fields, matches)
            if not matches.taken:
                raise InputError(
                    f"{pattern}: nothing here to ingest{_listed(matches)}; expected {_expected()}"
                )
            found.taken |= matches.taken
            found.left |= matches.left
            found.loose |= matches.loose
    if not found.taken:
        raise InputError("no source given")
    paths = sorted(found.taken)
    if unnamable := next((path for path in paths if printable(path) != path), None):
        raise InputError(
            f"{printable(unnamable)}: this name is not UTF-8, a corpus cannot note it; rename it"
        )
    if len({is_url(path) for path in paths}) > 1:
        raise InputError(
            "sources: local files and URLs cannot be one corpus; ingest them separately"
        )
    root = _root(paths, found.taken)
    files = [
        SourceFile(kind, path, path[len(root) + 1 :], size, modified, problem)
        for path in paths
        for kind, size, modified, problem in [found.taken[path]]
    ]
    left = Counter(kind for path, kind in found.left.items() if path not in found.taken)
    return Expanded(root, files, dict(sorted(left.items())), len(found.loose))


def _listed(found: _Found) -> str:
    counts = Counter(found.left.values()).most_common(5)
    return f" (found {', '.join(f'{count} x {kind}' for kind, count in counts)})" if counts else ""


def _patterns(source: str) -> list[str]:
    """The source with its braces written out, but for those of folders and files that are there
    under such names."""
    if "{" not in source:
        return [source]
    if is_url(source):
        start, rest = "", source
        if _exists(source):
            return [source]
    else:
        start, rest = _standing(source)
    if "{" not in rest:
        return [source]
    try:
        return [f"{start}{pattern}" for pattern in braceexpand(rest)]
    except ValueError:
        if glob.has_magic(rest) and _matches(source):
            return [source]
        raise InputError(
            f"{source}: a brace without its other one; write data/{{00..41}}.tar, or * instead"
        ) from None


def _standing(pattern: str) -> tuple[str, str]:
    """(the longest start of a local pattern that is there as it stands, the rest)."""
    parts = pattern.split("/")
    for count in range(len(parts), 0, -1):
        start = "/".join(parts[:count])
        if start and os.path.lexists(_absolute(start)):
            return start, pattern[len(start) :]
    return "", pattern


def _absolute(pattern: str) -> Path:
    return Path(pattern.removeprefix("file://")).expanduser().absolute()


def _matches(pattern: str) -> list[Path]:
    """What a local pattern matches. A folder that is there under this very name is no pattern."""
    start, rest = _standing(pattern)
    place = glob.escape(str(_absolute(start))) + rest if start else str(_absolute(pattern))
    return [Path(match) for match in glob.glob(place, recursive=True)]  # noqa: PTH207  (** and sorted below)


def _exists(url: str) -> bool:
    try:
        file_system, path = open_url(url)
        with plain_refusals(url):
            return bool(file_system.exists(path))
    except (OSError, StorageError):
        return False


def _expected() -> str:
    return f"{', '.join(s for suffixes in KINDS.values() for s in suffixes)} or a folder of images"


def _is_image(path: str) -> bool:
    return path.rpartition(".")[2].lower() in SUFFIXES


def _local(pattern: str, fields: FieldNames, found: _Found) -> None:
    path = _absolute(pattern)
    if os.path.lexists(path):
        if path.is_dir():
            _local_folder(path, fields, found)
        elif kind := kind_of(path.name):
            found.take(path, kind)
        else:
            raise InputError(f"{path}: unknown kind of source; expected {_expected()}")
        return
    if not glob.has_magic(pattern):
        raise InputError(f"{pattern}: no such file or folder")
    for match in _matches(pattern):
        # a glob means its dots
        if not match.name.startswith(".") and (system := hidden_kind(match.name)):
            found.left[str(match)] = system
        elif match.is_dir():
            _local_folder(match, fields, found)
        elif kind := kind_of(match.name):
            found.take(match, kind)
        else:
            found.leave([str(match)], "the sources")


def _local_folder(folder: Path, fields: FieldNames, found: _Found) -> None:
    files, left = walk(folder)
    found.left |= left
    names = [str(file) for file in files]
    kind, taken = _choose(names, fields)
    if kind != FOLDER:
        for name in taken:
            # A link to a tar is followed wherever it leads: of a file that is none, nothing is
            # taken.
            found.take(Path(name), kind, None if kind == "tar" else folder)
        _leave_others(found, names, kind, taken, fields)
        return
    parents = sorted({str(Path(name).parent) for name in taken})
    members: dict[str, list[Path]] = {parent: [] for parent in parents}
    for file in files:
        if (parent := str(file.parent)) not in members:
            found.leave([str(file)], "the images")
        elif file.is_file():
            # what of them is no image or caption is counted when they are read
            members[parent].append(file)
    for parent, inside in members.items():
        size = sum(member.stat().st_size for member in inside)
        newest = max((member.stat().st_mtime_ns for member in inside), default=0)
        found.taken[parent] = (FOLDER, size, str(newest), None)


def _choose(names: Sequence[str], fields: FieldNames) -> tuple[str, list[str]]:
    """(kind, paths of that kind). Images with captions beside them come before a table that names
    no image."""
    images = [name for name in names if _is_image(name)]
    by_kind = {kind: [name for name in names if kind_of(name) == kind] for kind in KINDS}
    kind = next((kind for kind, paths in by_kind.items() if paths), None)
    if images and kind in (None, "text"):
        return FOLDER, images
    if kind is None:
        return "text", []
    captioned = images and kind != "tar" and not fields.captions_only and _captioned(images, names)
    if captioned and not any(image_field(kind, path, fields) for path in by_kind[kind]):
        return FOLDER, images
    return kind, by_kind[kind]


def _captioned(images: Sequence[str], names: Sequence[str]) -> bool:
    beside = {
        name[: name.rindex(".")] for name in names if suffix_kind(name).lstrip(".") in TEXT_SUFFIXES
    }
    return any(image.rpartition(".")[0] in beside for image in images)


def _leave_others(
    found: _Found, names: Sequence[str], kind: str, taken: Sequence[str], fields: FieldNames
) -> None:
    """Leave out all but the one kind of file that is taken, and the images whose paths its rows
    hold."""
    chosen = set(taken)
    others = [name for name in names if name not in chosen]
    images = {name for name in others if _is_image(name)} if kind not in ("tar", "text") else set()
    if images and any(image_field(kind, path, fields) == PATHS for path in taken):
        found.loose |= images
    elif not fields.captions_only:
        images = set()
    found.leave(
        (name for name in others if name not in images), KINDS[kind][0] if taken else "no source"
    )


def _remote(pattern: str, fields: FieldNames, found: _Found) -> None:
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
    sizes: dict[str, Any] = {}
    for name, info in entries.items():
        url = f"{protocol}://{name.lstrip('/')}"
        below = (
            name.removeprefix(path).lstrip("/").split("/")
            if name.startswith(path)
            else [name.rpartition("/")[2]]
        )
        if info["type"] != "file":
            continue
        if hidden := next(filter(None, map(hidden_kind, below)), None):
            found.left[url] = hidden
        else:
            sizes[url] = info
    kind, taken = _choose([name for name in sizes if not _is_image(name)], fields)
    for name in taken:
        found.taken[name] = (kind, int(sizes[name]["size"]), _version(sizes[name]), None)
    _leave_others(found, list(sizes), kind, taken, fields)


def _version(info: dict[str, Any]) -> str:
    return str(
        info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or ""
    )


def _root(paths: Sequence[str], found: dict[str, tuple[str, int, str, str | None]]) -> str:
    # A folder of images is its own root when it is the only source, so that names never depend on
    # where it lies.
    parents = [path if found[path][0] == FOLDER else path.rpartition("/")[0] for path in paths]
    parts = [parent.split("/") for parent in parents]
    common = []
    for step in zip(*parts, strict=False):
        if len(set(step)) > 1:
            break
        common.append(step[0])
    return "/".join(common)
