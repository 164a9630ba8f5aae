"""What a table or text file says of itself before it is read: whether it has a field for images."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from lidit.sources.base import BadRecordError, FieldNames, lines, open_binary, parse_json
from lidit.sources.tables import schema_of
from lidit.sources.text_files import delimiter_of
from lidit.sources.walk import problem_of
from lidit.store.files.folder import is_url

BYTES, PATHS = "bytes", "paths"


def image_field(kind: str, path: str, fields: FieldNames) -> str | None:
    """BYTES or PATHS, by what the file's image field holds; None without one.

    Also None for a file that cannot be read: its reader says why.
    """
    if fields.captions_only or (not is_url(path) and problem_of(Path(path))):
        return None
    try:
        if kind == "table":
            schema = schema_of(path)
            name = next((name for name in fields.images if name in schema.names), None)
            if name is None:
                return None
            kind_of_values = schema.field(name).type
            return (
                PATHS
                if pa.types.is_string(kind_of_values) or pa.types.is_large_string(kind_of_values)
                else BYTES
            )
        return PATHS if set(_first_fields(kind, path, fields)) & set(fields.images) else None
    except (OSError, pa.ArrowException, BadRecordError, csv.Error):
        return None


def _first_fields(kind: str, path: str, fields: FieldNames) -> list[Any]:
    """The fields of the first row, or the header."""
    with open_binary(path) as file:
        stream = (
            file
            if isinstance(file, io.BufferedReader)
            else io.BufferedReader(cast(io.RawIOBase, file))
        )
        first = (
            next((line for _, line in lines(stream) if line is None or line.strip()), None) or b""
        )
    if kind == "csv":
        header = first.decode("utf-8-sig", "replace")
        return next(csv.reader([header], delimiter=delimiter_of(path, header, fields)), [])
    record = parse_json(first) if kind == "jsonl" and first else {}
    return list(record) if isinstance(record, dict) else []
