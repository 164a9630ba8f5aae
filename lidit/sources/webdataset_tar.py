"""WebDataset tars: consecutive members of one key are one sample. Nothing is extracted and no decoder is run."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from lidit.errors import one_line
from lidit.images.decode import SUFFIXES
from lidit.sources.base import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    ORIGINAL,
    BadRecordError,
    FieldNames,
    OpenedSource,
    RawSample,
    captions_in,
    label_in,
    parse_json,
    shown,
)
from lidit.sources.tar_archive import open_archive
from lidit.store import ImageReference, Refusal

_TEXT_SUFFIXES = ("txt", "json", "cls")
_SPECIAL = {
    tarfile.SYMTYPE: "a symlink",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


@dataclass
class _Group:
    """The members of one sample, as far as they have been read."""

    key: str
    image: bytes | None = None
    reference: ImageReference | None = None
    captions: list[tuple[str, str]] = field(default_factory=list)
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    problem: str | None = None
    whole: bool = True

    def usable(self, fields: FieldNames) -> bool:
        """Whether what was read makes a sample, so that nothing of it need be missing."""
        text = bool(self.captions) or self.label is not None
        return self.whole and text and (self.reference is not None or fields.captions_only)

    def finish(self, file: str) -> RawSample | Refusal:
        if self.problem:
            return Refusal(self.key, file, self.problem)
        return RawSample(self.key, tuple(self.captions), self.image, self.reference, self.label, self.meta)


def read_tar(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """Every sample of the archive in order; refusals for what is broken, also for what a cut archive lost."""
    name = opened.source.name
    compressed = is_compressed(name)
    group: _Group | None = None
    place, reason = "at its start", None
    try:
        with open_archive(opened.stream(), compressed) as archive:
            for member in archive.each():
                if member.isdir():
                    continue
                key, suffix = split_name(member.name)
                if group is None or key != group.key:
                    if group is not None:
                        finished, group = group, None
                        yield finished.finish(name)
                    group = _Group(key)
                place = f"inside member {shown(member.name)} at byte {member.offset}"
                group.whole = False
                _take(group, archive, member, suffix, fields, opened, compressed)
                group.whole = True
                place = f"after member {shown(member.name)} at byte {member.offset}"
            reason = archive.stop or archive.beyond_end()
    except tarfile.TarError as error:
        reason = one_line(error) or "unexpected end"
    if group is not None and group.seen:
        if reason and not group.usable(fields):
            yield Refusal(group.key, name, f"archive cut off {place}: this sample is not whole")
        else:
            yield group.finish(name)
    if reason:
        yield Refusal("", name, f"archive cut off {place} ({reason}): what may have followed is lost", "file")


def _take(
    group: _Group,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    suffix: str,
    fields: FieldNames,
    opened: OpenedSource,
    compressed: bool,
) -> None:
    """Add one member to its sample, or note why the sample cannot be used."""
    is_image = suffix in SUFFIXES
    if not is_image and suffix not in _TEXT_SUFFIXES:
        opened.ignore(suffix)
        return
    if is_image and fields.captions_only:
        return
    problem = None
    limit = MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES
    if _unsafe(member.name):
        problem = f"unsafe name: {shown(member.name)} leaves the archive's folder"
    elif not member.isreg() or member.issparse():
        problem = f"not a file: {shown(member.name)} is {_SPECIAL.get(member.type, 'a special member')}"
    elif suffix in group.seen:
        problem = f"duplicate member: two .{suffix} of one key"
    elif is_image and group.reference is not None:
        problem = f"two images: .{suffix} beside {shown(group.reference.member)}"
    elif member.size > limit:
        problem = f"member too large: {shown(member.name)} has {member.size} bytes, at most {limit} are read"
    group.seen.add(suffix)
    if problem:
        group.problem = group.problem or problem
        return
    extracted = archive.extractfile(member)
    assert extracted is not None
    content = extracted.read()
    if is_image:
        group.image = content
        group.reference = ImageReference(
            opened.source.name,
            member.name,
            None if compressed else member.offset_data,
            None if compressed else member.size,
        )
        return
    try:
        _take_text(group, suffix, content, fields)
    except BadRecordError as error:
        group.problem = group.problem or f"{error} in .{suffix}"


def _take_text(group: _Group, suffix: str, content: bytes, fields: FieldNames) -> None:
    if suffix == "json":
        record = parse_json(content)
        if not isinstance(record, dict):
            raise BadRecordError(f"invalid JSON: expected an object, found {type(record).__name__}")
        group.meta = record
        group.label = group.label or label_in(record)
        group.captions += captions_in(record, fields.captions)
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"invalid UTF-8: byte {error.start}") from None
    if suffix == "cls":
        group.label = text.strip()
    else:
        group.captions.insert(0, (text, ORIGINAL))


def split_name(member: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path part; the rest is the suffix."""
    folder, slash, base = member.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def is_compressed(path: str) -> bool:
    """Whether an archive of this name is gzipped."""
    return path.lower().endswith((".gz", ".tgz"))


def read_members(stream: BinaryIO, compressed: bool, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """The named members of an archive, in its order: for archives whose members have no offset."""
    with open_archive(stream, compressed) as archive:
        for member in archive.each():
            if member.name in wanted and member.isreg() and member.size <= MAX_IMAGE_BYTES:
                extracted = archive.extractfile(member)
                assert extracted is not None
                yield member.name, extracted.read()


def _unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or "\0" in name or "\\" in name
