"""Line-based sources: JSONL and CSV rows (with image paths or without), and plain text with one
caption per line.
"""

from __future__ import annotations

import codecs
import csv
import errno
import io
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from lidit.sources.base import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    ORIGINAL,
    BadRecordError,
    FieldNames,
    OpenedSource,
    RawSample,
    captions_in,
    key_in,
    label_in,
    lines,
    open_binary,
    packed_as,
    parse_json,
    shown,
)
from lidit.sources.columns import note
from lidit.sources.walk import special
from lidit.store import ImageReference, Refusal
from lidit.store.files.folder import is_url

# What the path itself is to blame for. Others, such as an I/O error, end the reading: the next file
# may fail likewise.
_OF_THE_PATH = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
)

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # what a spreadsheet calls Unicode


def read_text(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """One caption per line; no images."""
    name = opened.source.name
    stream = opened.stream()
    if refusal := _no_text(name, stream):
        yield refusal
        return
    for number, line in lines(stream):
        key = f"{name}:{number}"
        if line is None:
            yield Refusal(
                key, name, f"line too long: line {number} has more than {MAX_TEXT_BYTES} bytes"
            )
            continue
        try:
            yield RawSample(key, ((line.decode("utf-8-sig"), ORIGINAL),))
        except UnicodeDecodeError as error:
            yield Refusal(key, name, f"invalid UTF-8: line {number}, byte {error.start}")


def read_jsonl(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """One JSON object per line; blank lines are no rows. The first row decides whether the file has
    images.
    """
    name = opened.source.name
    image_field: str | None = None
    first = True
    stream = opened.stream()
    if refusal := _no_text(name, stream):
        yield refusal
        return
    for number, line in lines(stream):
        key = f"{name}:{number}"
        if line is not None and not line.strip():
            continue
        try:
            if line is None:
                raise BadRecordError(f"line too long: more than {MAX_TEXT_BYTES} bytes")
            record = parse_json(line)
            if not isinstance(record, dict):
                raise BadRecordError(
                    f"invalid JSON: expected an object, found {type(record).__name__}"
                )
            if first:
                image_field, first = _image_field(record, fields), False
            elif image_field is None and (late := _image_field(record, fields)) and record[late]:
                raise BadRecordError(
                    f"unexpected image: field {late!r} has one, the file's first row has none"
                )
        except BadRecordError as error:
            yield Refusal(key, name, f"{error} (line {number})")
            continue
        yield _row(opened, record, key, image_field, fields)


def read_csv(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """Rows of a CSV or TSV file with a header line."""
    name = opened.source.name
    stream = opened.stream()
    if refusal := _no_text(name, stream):
        yield refusal
        return
    csv.field_size_limit(MAX_TEXT_BYTES)
    # Invalid bytes become surrogates, which the caption check refuses row by row; strict decoding
    # would lose the file.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    header = text.readline()
    try:
        rows = csv.DictReader(chain([header], text), delimiter=delimiter_of(name, header, fields))
        image_field = _image_field(dict.fromkeys(rows.fieldnames or [], ""), fields)
    except csv.Error as error:
        yield Refusal("", name, f"invalid CSV: the header cannot be read: {error}", "file")
        text.detach()
        return
    while True:
        key = f"{name}:{rows.line_num + 1}"
        try:
            record = next(rows, None)
        except csv.Error as error:
            yield Refusal(key, name, f"invalid CSV: line {rows.line_num}: {error}")
            continue
        if record is None:
            break
        beyond: Any = record.pop(None, [])
        if any(beyond):  # where only empty ones follow, nothing is lost
            cells = f"{len(beyond)} more {'cell' if len(beyond) == 1 else 'cells'} than the header"
            yield Refusal(
                key,
                name,
                f"invalid CSV: line {rows.line_num} has {cells}; quote captions that hold commas",
            )
            continue
        yield _row(opened, {k: v for k, v in record.items() if k}, key, image_field, fields)
    text.detach()


def delimiter_of(name: str, header: str, fields: FieldNames) -> str:
    """What separates the cells of a CSV or TSV file: a comma, or what spreadsheets of other
    languages write.

    header: the first line. Another separator is believed only where a comma separates nothing and
    the other one gives a field that is read.
    """
    if name.lower().endswith(".tsv"):
        return "\t"
    if len(_cells(header, ",")) == 1:
        for delimiter in (";", "\t", "|"):
            cells = _cells(header, delimiter)
            if len(cells) > 1 and not {*fields.captions, *fields.images}.isdisjoint(cells):
                return delimiter
    return ","


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _no_text(name: str, stream: io.BufferedReader) -> Refusal | None:
    """Why a file's first bytes, which stay unread, are no text in UTF-8; None for
    what they may be.
    """
    if packed := packed_as(stream):
        remedy = "unpack it, or give it the suffix of its kind"
        return Refusal(
            "", name, f"not a text file: {shown(name)} is {packed} inside; {remedy}", "file"
        )
    if stream.peek(2)[:2] in UTF_16:
        remedy = "save it as UTF-8, or convert it: iconv -f UTF-16 -t UTF-8"
        return Refusal("", name, f"not in UTF-8: {shown(name)} is UTF-16; {remedy}", "file")
    return None


def _image_field(record: dict[str, Any], fields: FieldNames) -> str | None:
    if fields.captions_only:
        return None
    return next((name for name in fields.images if name in record), None)


def _row(
    opened: OpenedSource,
    record: dict[str, Any],
    otherwise: str,
    image_field: str | None,
    fields: FieldNames,
) -> RawSample | Refusal:
    name = opened.source.name
    key = key_in(record, otherwise)
    note(opened.columns, record)
    if not fields.captions_only and (problem := failed_download(record)):
        return Refusal(key, name, problem)
    captions = tuple(captions_in(record, fields.captions))
    if image_field is None:
        return RawSample(key, captions, label=label_in(record), meta=record)
    path = record.get(image_field)
    if not isinstance(path, str) or not path:
        return Refusal(key, name, f"no image: field {image_field!r} is empty")
    try:
        content, reference = beside(opened, path)
    except BadRecordError as error:
        return Refusal(key, name, str(error))
    return RawSample(key, captions, content, reference, label_in(record), record)


def failed_download(record: Mapping[str, Any]) -> str | None:
    """Why img2dataset could not fetch a row's picture; None where it did, and for rows that it did
    not write."""
    if not {"url", "status", "error_message"} <= record.keys() or record["status"] == "success":
        return None
    return f"failed download: {shown(str(record['status']))}, {shown(str(record['error_message']))}"


def beside(opened: OpenedSource, image: str) -> tuple[bytes, ImageReference]:
    """An image named by a row, relative to the folder of the table it stands in; never outside that
    folder.

    Raises BadRecordError with the reason.
    """
    pure = PurePosixPath(image)
    if pure.is_absolute() or ".." in pure.parts or "\0" in image or "\\" in image or is_url(image):
        raise BadRecordError(f"unsafe name: {shown(image)!r} leaves the folder of its table")
    parent, _, _ = opened.source.path.rpartition("/")
    folder_name, slash, _ = opened.source.name.rpartition("/")
    content = read_inside(parent, image)
    opened.named.add(str(pure))
    return content, ImageReference(f"{folder_name}{slash}{image}", "", 0, len(content))


def read_inside(folder: str, name: str, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """A file below `folder`, also after following symlinks. Raises BadRecordError
    with the reason.
    """
    try:
        if not is_url(folder):
            # resolve() raises where links lead to each other; here that is no file, as is_file()
            # says.
            real = Path(os.path.realpath(f"{folder}/{name}"))
            if not real.is_relative_to(os.path.realpath(folder)):
                raise BadRecordError(f"unsafe name: {shown(name)!r} is a link out of its folder")
            if not real.exists():
                raise BadRecordError(f"no file: {shown(name)!r} does not exist")
            if not real.is_file():
                raise BadRecordError(
                    f"not a file: {shown(name)!r} is {special(real.stat().st_mode)}"
                )
        with open_binary(f"{folder}/{name}") as file:
            size = file.seek(0, os.SEEK_END)
            if size > limit:
                raise BadRecordError(
                    f"file too large: {shown(name)!r} has {size} bytes, at most {limit} are read"
                )
            file.seek(0)
            return file.read()
    except FileNotFoundError:
        raise BadRecordError(f"no file: {shown(name)!r} does not exist") from None
    except UnicodeEncodeError:
        raise BadRecordError(
            f"unreadable file: {shown(name)!r} holds characters that no name can have"
        ) from None
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        raise BadRecordError(
            f"unreadable file: {shown(name)!r}: {os.strerror(error.errno)}"
        ) from None
