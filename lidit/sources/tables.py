"""Parquet and Arrow tables: image bytes or paths in a column, captions in others, or captions alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
        for batch in batches(opened.source.path, None):
            image_field = _image_column(batch.schema, fields)
            for record in batch.to_pylist():
                yield _sample(opened, record, row, image_field, fields)
                row += 1
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split())
        yield Refusal("", name, f"broken table: after row {row}: {reason}", "file")
    with open_binary(opened.source.path) as file:
        while block := file.read(1 << 20):
            opened.hash(block)


def batches(path: str, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Record batches of a Parquet or Arrow IPC (file or stream) table."""
    with open_binary(path) as file:
        if path.endswith((".parquet", ".pq")):
            yield from pq.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS, columns=columns)
            return
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            for batch in pa.ipc.open_stream(file):
                yield batch if columns is None else batch.select(columns)
            return
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            yield batch if columns is None else batch.select(columns)


def image_bytes(path: str, column: str, rows: set[int]) -> Iterator[tuple[int, bytes]]:
    """The image bytes of some rows, in order."""
    first = 0
    for batch in batches(path, [column]):
        for row in sorted(rows & set(range(first, first + batch.num_rows))):
            value = batch.column(0)[row - first].as_py()
            yield row, value["bytes"] if isinstance(value, dict) else value
        first += batch.num_rows


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
