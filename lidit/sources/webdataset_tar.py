"""WebDataset tars: consecutive members of one key are one sample. Nothing is extracted and no
decoder is run.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lidit.errors import one_line
from lidit.images.decode import SUFFIXES
from lidit.sources.base import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    ORIGINAL,
    SECOND_DOT,
    BadRecordError,
    FieldNames,
    OpenedSource,
    RawSample,
    captions_in,
    hidden_kind,
    label_in,
    packed_as,
    parse_json,
    shown,
    suffix_kind,
)
from lidit.sources.columns import note
from lidit.sources.tar_archive import Archive, open_archive
from lidit.store import ImageReference, Refusal

_TEXT_SUFFIXES = ("txt", "caption", "json", "cls")
_SPECIAL = {
    tarfile.SYMTYPE: "a symlink",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}
# Samples that miss their image or their text, held back until the archive's end shows whether it
# came later.
_MAX_HELD = 100_000


@dataclass
class _Group:
    """The members of one sample, as far as they have been read. found: their suffixes, of what is
    ignored, too."""

    key: str
    image: bytes | None = None
    reference: ImageReference | None = None
    captions: list[tuple[str, str]] = field(default_factory=list)
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    found: list[str] = field(default_factory=list)
    problem: str | None = None
    whole: bool = True

    def usable(self, fields: FieldNames) -> bool:
        """Whether what was read makes a sample, so that nothing of it need be missing."""
        text = bool(self.captions) or self.label is not None
        return self.whole and text and (self.reference is not None or fields.captions_only)

    def finish(self, file: str) -> RawSample | Refusal:
        if self.problem:
            return Refusal(self.key, file, self.problem)
        found = tuple(self.found)
        return RawSample(
            self.key, tuple(self.captions), self.image, self.reference, self.label, self.meta, found
        )


class _Held:
    """Samples that miss something: told apart at the archive's end are members that stand apart and
    those alone."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._whole: set[str] = set()
        self._halves: dict[str, list[RawSample | Refusal]] = {}
        self._count = 0

    def take(self, group: _Group, fields: FieldNames) -> Iterator[RawSample | Refusal]:
        """The sample or refusal of a finished group; none yet where the rest of it may follow."""
        if not group.seen:
            return  # of ignored members only, which are counted
        finished = group.finish(self.file)
        if group.problem or group.usable(fields) or self._count >= _MAX_HELD:
            if len(self._whole) < _MAX_HELD:
                self._whole.add(group.key)
            yield finished
            return
        self._count += 1
        group.image = None  # not kept in memory: without a caption it is of no use
        self._halves.setdefault(group.key, []).append(group.finish(self.file))

    def rest(self, fields: FieldNames) -> Iterator[RawSample | Refusal]:
        """What was held back, at the archive's end."""
        for key, halves in self._halves.items():
            if fields.captions_only and key in self._whole:
                continue  # an image, which nobody wants, apart from its text
            if len(halves) > 1 or key in self._whole:
                reason = (
                    "not adjacent, use tar --sort=name: members of this key stand apart in "
                    "the archive"
                )
                yield Refusal(key, self.file, reason)
            else:
                yield halves[0]


def read_tar(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """Every sample of the archive in order; refusals for what is broken, also for what a cut
    archive lost.
    """
    name = opened.source.name
    group: _Group | None = None
    held = _Held(name)
    place, reason = "at its start", None
    stream = opened.stream()
    if (packed := packed_as(stream)) not in (None, "gzip"):
        yield Refusal(
            "", name, f"not a tar but {packed}: unpack it, and pack it again as a tar", "file"
        )
        return
    compressed = packed == "gzip"
    try:
        with open_archive(stream) as archive:
            for member in archive.each():
                if member.isdir():
                    continue
                if hidden := _hidden(member.name):
                    opened.ignore(hidden)
                    continue
                key, suffix = split_name(member.name)
                if not suffix:
                    opened.ignore("no suffix")
                    continue
                if group is None or key != group.key:
                    if group is not None:
                        finished, group = group, None
                        yield from held.take(finished, fields)
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
            yield Refusal(group.key, name, f"archive cut off: {place}: this sample is not whole")
        else:
            yield from held.take(group, fields)
    yield from held.rest(fields)
    if reason:
        yield Refusal(
            "", name, f"archive cut off: {place} ({reason}): what may have followed is lost", "file"
        )


def _take(
    group: _Group,
    archive: Archive,
    member: tarfile.TarInfo,
    suffix: str,
    fields: FieldNames,
    opened: OpenedSource,
    compressed: bool,
) -> None:
    """Add one member to its sample, or note why the sample cannot be used."""
    is_image = suffix in SUFFIXES
    group.found.append(shown(f".{suffix}"))
    if not is_image and suffix not in _TEXT_SUFFIXES:
        opened.ignore(_ignored_kind(suffix))
        return
    if is_image and fields.captions_only:
        group.seen.add(suffix)
        return
    problem = None
    limit = MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES
    if _unsafe(member.name):
        problem = f"unsafe name: {shown(member.name)} leaves the archive's folder"
    elif not member.isreg() or member.issparse():
        problem = (
            f"not a file: {shown(member.name)} is {_SPECIAL.get(member.type, 'a special member')}"
        )
    elif suffix in group.seen:
        problem = f"duplicate member: two .{suffix} of one key"
    elif is_image and group.reference is not None:
        problem = f"two images: .{suffix} beside {shown(group.reference.member)}"
    elif member.size > limit:
        problem = (
            f"member too large: {shown(member.name)} has {member.size} bytes, at most "
            f"{limit} are read"
        )
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
        _take_text(group, suffix, content, fields, opened)
    except BadRecordError as error:
        group.problem = group.problem or f"{error} in .{suffix}"


def _take_text(
    group: _Group, suffix: str, content: bytes, fields: FieldNames, opened: OpenedSource
) -> None:
    if suffix == "json":
        record = parse_json(content)
        if not isinstance(record, dict):
            raise BadRecordError(f"invalid JSON: expected an object, found {type(record).__name__}")
        group.meta = record
        note(
            opened.columns,
            {name: value for name, value in record.items() if name not in fields.images},
        )
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
        group.captions.insert(int(suffix == "caption" and "txt" in group.seen), (text, ORIGINAL))


def split_name(member: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path part; the rest is the
    suffix.
    """
    folder, slash, base = member.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _hidden(member: str) -> str | None:
    """What to call a member that some system put there; also one in a folder of a system."""
    *folders, base = member.split("/")
    found = next((kind for folder in folders if (kind := hidden_kind(folder))), None)
    return f"{found}/" if found else hidden_kind(base)


def _ignored_kind(suffix: str) -> str:
    last = suffix_kind(f"x.{suffix}")
    known = last.lstrip(".") in SUFFIXES or last.lstrip(".") in _TEXT_SUFFIXES
    return f"{last} {SECOND_DOT}" if known and "." in suffix else last


def read_members(stream: io.BufferedReader, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """The named members of an archive, in its order: for archives whose members have no offset."""
    with open_archive(stream) as archive:
        for member in archive.each():
            if member.name in wanted and member.isreg() and member.size <= MAX_IMAGE_BYTES:
                extracted = archive.extractfile(member)
                assert extracted is not None
                yield member.name, extracted.read()


def _unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or "\0" in name or "\\" in name
