"""Parquet and Arrow tables: image bytes or paths in a column, captions in others, or captions
alone.
"""

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
from lidit.sources.columns import note
from lidit.sources.text_files import beside, failed_download
from lidit.store import ImageReference, Refusal

_BATCH_ROWS = 256


def read_table(opened: OpenedSource, fields: FieldNames) -> Iterator[RawSample | Refusal]:
    """Every row in order. The image column holds bytes, a {"bytes", "path"} struct (Hugging Face)
    or paths.
    """
    name = opened.source.name
    row = 0
    try:
        for row, batch in batches(opened.source.path):
            image_field = _image_column(batch.schema, fields)
            for record in _records(batch):
                if isinstance(record, BadRecordError):
                    yield Refusal(f"{name}:{row}", name, f"{record} (row {row})")
                else:
                    note(opened.columns, record, batch.schema)
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


def schema_of(path: str) -> pa.Schema:
    """The columns of a Parquet or Arrow IPC table. Raises pa.ArrowException for what is none."""
    with open_binary(path) as file:
        if path.lower().endswith((".parquet", ".pq")):
            return pq.read_schema(file)
        try:
            return pa.ipc.open_file(file).schema
        except pa.ArrowInvalid:
            file.seek(0)
            return pa.ipc.open_stream(file).schema


def batches(
    path: str, columns: list[str] | None = None, rows: Set[int] | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(first row, rows) of a Parquet or Arrow IPC (file or stream) table, in order, at most
    _BATCH_ROWS at once.

    rows: the ones that are wanted; what holds none of them may be left out, unread where the format
    allows that.
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
        for batch in pa.ipc.open_stream(file):
            yield _sound(batch)
        return
    for index in range(reader.num_record_batches):
        yield _sound(reader.get_batch(index))


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, every offset in it checked. Raises pa.ArrowInvalid.

    Arrow trusts them: one that points out of its buffer reads other memory of this process, or ends
    it.
    """
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "Invalid UTF8" not in str(error):
                raise
            # A text that is none costs its row, later; here the offsets of the rest are to be
            # checked all the same.
            column.view(_as_bytes(column.type)).validate(full=True)
    return batch


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type of the same layout that holds bytes where this one holds texts, at any depth."""
    texts = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    if kind in texts:
        return texts[kind]
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    for same, made in ((pa.types.is_list, pa.list_), (pa.types.is_large_list, pa.large_list)):
        if same(kind):
            return made(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind


def image_bytes(path: str, column: str, rows: Set[int]) -> Iterator[tuple[int, bytes]]:
    """The image bytes of some rows, in order. Reads no row behind the last of them."""
    last = max(rows)
    for first, batch in batches(path, [column], rows):
        for row in sorted(rows & set(range(first, first + batch.num_rows))):
            value = batch.column(column)[row - first].as_py()
            value = _only(value)
            yield row, value["bytes"] if isinstance(value, dict) else value
        if first + batch.num_rows > last:
            return


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRecordError]:
    """Rows as Python values. One value that Python cannot hold would take the whole batch with it:
    then row by row.
    """
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


def _only(value: Any) -> Any:
    """The image of a list that holds one; every other value as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _without_bytes(value: Any) -> Any:
    """A value for metadata: bytes, at any depth, are left out with the field that holds them."""
    if isinstance(value, dict):
        return {
            name: _without_bytes(inner)
            for name, inner in value.items()
            if not isinstance(inner, bytes)
        }
    if isinstance(value, list):
        return [_without_bytes(inner) for inner in value if not isinstance(inner, bytes)]
    return value


def _sample(
    opened: OpenedSource,
    record: dict[str, Any],
    row: int,
    image_field: str | None,
    fields: FieldNames,
) -> RawSample | Refusal:
    name = opened.source.name
    key = key_in(record, f"{name}:{row}")
    if not fields.captions_only and (problem := failed_download(record)):
        return Refusal(key, name, problem)
    captions = tuple(captions_in(record, fields.captions))
    meta = _without_bytes({name: value for name, value in record.items() if name != image_field})
    if image_field is None:
        return RawSample(key, captions, label=label_in(meta), meta=meta)
    value = _only(record.get(image_field))
    if isinstance(value, list) and value:
        return Refusal(
            key, name, f"several images: row {row} of column {image_field!r} holds {len(value)}"
        )
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        reference = ImageReference(name, f"{image_field}#{row}")
        return RawSample(key, captions, value, reference, label_in(meta), meta)
    if not isinstance(value, str) or not value:
        found = "empty" if not value else f"{type(value).__name__}, no bytes and no path"
        return Refusal(key, name, f"no image: row {row} of column {image_field!r} is {found}")
    try:
        content, reference = beside(opened, value)
    except BadRecordError as error:
        return Refusal(key, name, f"{error} (row {row})")
    return RawSample(key, captions, content, reference, label_in(meta), meta)
