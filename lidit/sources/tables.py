"""Parquet and Arrow tables: image bytes or paths in a column, captions in others, or captions alone."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lidit.errors import StorageError, one_line
from lidit.sources.base import (
    BadRecordError,
    FieldNames,
    OpenedSource,
    RawSample,
    captions_in,
    key_in,
    label_in,
    open_binary,
)
from lidit.sources.text_files import beside
from lidit.store import ImageReference, Refusal

_BATCH_ROWS = 256


def read_table(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """Every row in order. The image column holds bytes, a {"bytes", "path"} struct (Hugging Face) or paths."""
    name = opened.source.name
    row = 0
    try:
        for row, batch in batches(opened.source.path):
            image_field = _image_column(batch.schema, fields)
            for record in _records(batch):
                if isinstance(record, BadRecordError):
                    yield Refusal(f"{name}:{row}", name, f"{record} (row {row})")
                else:
                    yield _sample(opened, record, row, image_field, fields)
                row += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (error.errno or isinstance(error, StorageError)):
            raise
        reason = one_line(error)
        yield Refusal("", name, f"broken table: after row {row}: {reason}", "file")
    with open_binary(opened.source.path) as file:
        while block := file.read(1 << 20):
            opened.hash(block)


def batches(
    path: str, columns: list[str] | None = None, rows: Set[int] | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, rows) of a Parquet or Arrow IPC (file or stream) table, in order, at most _BATCH_ROWS at once.

    rows: the ones that are wanted; what holds none of them may be left out, unread where the format allows that.
    """
    with open_binary(path) as file:
        read = _parquet_batches if path.lower().endswith((".parquet", ".pq")) else _ipc_batches
        for first, batch in read(file, columns, rows):
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield first + start, batch.slice(start, _BATCH_ROWS)


def _parquet_batches(
    file: BinaryIO, columns: list[str] | None, rows: Set[int] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    table = pq.ParquetFile(file)
    first = 0
    for group in range(table.num_row_groups):
        stop = first + table.metadata.row_group(group).num_rows
        if rows is None or not rows.isdisjoint(range(first, stop)):
            row = first
            for batch in table.iter_batches(_BATCH_ROWS, [group], columns):
                yield row, batch
                row += batch.num_rows
        first = stop


def _ipc_batches(
    file: BinaryIO, columns: list[str] | None, rows: Set[int] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    # How many rows a batch has is known only once it is read.
    last = None if rows is None else max(rows)
    first = 0
    for batch in _ipc_whole(file):
        if last is not None and first > last:
            return
        yield first, batch if columns is None else batch.select(columns)
        first += batch.num_rows


def _ipc_whole(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        yield from pa.ipc.open_stream(file)
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def image_bytes(path: str, column: str, rows: Set[int]) -> Iterator[tuple[int, bytes]]:
    """The image bytes of some rows, in order. Reads no row behind the last of them."""
    last = max(rows)
    for first, batch in batches(path, [column], rows):
        for row in sorted(rows & set(range(first, first + batch.num_rows))):
            value = batch.column(column)[row - first].as_py()
            yield row, value["bytes"] if isinstance(value, dict) else value
        if first + batch.num_rows > last:
            return


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRecordError]:
    """Rows as Python values. One value that Python cannot hold would take the whole batch with it: then row by row."""
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError):
        yield from (_record(batch, row) for row in range(batch.num_rows))
    else:
        yield from records


def _record(batch: pa.RecordBatch, row: int) -> dict[str, Any] | BadRecordError:
    record = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            record[name] = column[row].as_py()
        except (ValueError, OverflowError) as error:
            return BadRecordError(f"invalid value: column {name}: {one_line(error)}")
    return record


def _image_column(schema: pa.Schema, fields: FieldNames) -> str | None:
    if fields.captions_only:
        return None
    return next((name for name in fields.images if name in schema.names), None)


def _sample(
    opened: OpenedSource, record: dict[str, Any], row: int, image_field: str | None, fields: FieldNames
) -> RawSample | Refusal:
    name = opened.source.name
    key = key_in(record, f"{name}:{row}")
    captions = tuple(captions_in(record, fields.captions))
    value = record.get(image_field) if image_field else None
    meta = {k: v for k, v in record.items() if k != image_field and not isinstance(v, bytes)}
    if image_field is None:
        return RawSample(key, captions, label=label_in(meta), meta=meta)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        reference = ImageReference(name, f"{image_field}#{row}")
        return RawSample(key, captions, value, reference, label_in(meta), meta)
    if not isinstance(value, str) or not value:
        return Refusal(key, name, f"no image: row {row} of column {image_field!r} is empty")
    try:
        content, found = beside(opened.source.path, name, value)
    except BadRecordError as error:
        return Refusal(key, name, f"{error} (row {row})")
    return RawSample(key, captions, content, found, label_in(meta), meta)
