"""Which columns of tables and fields of rows were found, and which setting takes those that nothing
was taken from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from lidit.images.decode import SUFFIXES
from lidit.sources.base import KEY_FIELDS, ORIGINAL, FieldNames, shown

# Names of columns noted; a row of a thousand fields must not make a line of them.
MAX_COLUMNS = 40
_SHOWN_TYPE = 60
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
IMAGE_PATH, TEXT, WORD, URL, EMPTY = "image path", "text", "word", "URL", "empty"


def note(
    columns: dict[str, str], record: Mapping[str, Any], schema: pa.Schema | None = None
) -> None:
    """Add a row's fields to `columns`; a value replaces an empty one. With a schema, its types name
    all but texts."""
    for name, value in record.items():
        if columns.get(name, EMPTY) != EMPTY or (
            name not in columns and len(columns) >= MAX_COLUMNS
        ):
            continue
        said = _kind(value)
        if schema is not None and said not in (IMAGE_PATH, TEXT, WORD, URL):
            said = str(schema.field(name).type)
        columns[shown(name)] = said if len(said) <= _SHOWN_TYPE else f"{said[:_SHOWN_TYPE]}..."


def _kind(value: Any) -> str:
    if value is None or value == "":
        return EMPTY
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        if "://" in value[:20]:
            return URL
        if value.rpartition(".")[2].lower() in SUFFIXES and len(value) < 1000:
            return IMAGE_PATH
        if value[0] in "[{":
            return "JSON"
        if _NUMBER.fullmatch(value):
            return "number"
        return TEXT if len(value.split()) > 1 else WORD
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, list):
        return f"list of {_kind(value[0])}" if value else "empty list"
    return "object" if isinstance(value, dict) else type(value).__name__


def unused(columns: Mapping[str, str], fields: FieldNames) -> tuple[list[str], list[str]]:
    """(columns that look like images, columns that look like captions) of those that the settings
    do not name."""
    captions = {*fields.captions, "captions"}
    image = next((name for name in fields.images if name in columns), None)
    rest = {name: kind for name, kind in columns.items() if name not in captions and name != image}
    images = [name for name, kind in rest.items() if kind == IMAGE_PATH or _holds_bytes(kind)]
    texts = [
        name
        for name, kind in rest.items()
        if kind in (TEXT, f"list of {TEXT}") and name not in KEY_FIELDS
    ]
    return images, [name for name in texts if name not in images]


def _holds_bytes(kind: str) -> bool:
    return "binary" in kind or kind == f"list of {IMAGE_PATH}"


def lines_about(
    columns: Mapping[str, str], fields: FieldNames, samples: int, images: int
) -> list[str]:
    """What a person should know of the columns: one line with all of them, and one for each setting
    that takes more."""
    told = []
    image = (
        None
        if fields.captions_only
        else next((name for name in fields.images if name in columns), None)
    )
    if columns:
        listed = ", ".join(
            f"{name} ({kind}{_role(name, image, fields)})" for name, kind in columns.items()
        )
        told.append(f"columns found: {listed}")
    more_images, more_captions = unused(columns, fields)
    if samples and not images and not fields.captions_only:
        where = (
            f"no column is called {', '.join(fields.images)}"
            if image is None
            else f"{image} holds none"
        )
        why = where if columns else "the sources hold none"
        told.append(
            f"captions only, without images: {why}; set captions_only=true where that is meant"
        )
    if more_images and not images and not fields.captions_only:
        told.append(
            f"'image_fields=[{more_images[0]}]' takes images from {' or '.join(more_images)}"
        )
    if more_captions:
        kept = {name: origin for name, origin in fields.captions.items() if name in columns}
        origins = ", ".join(
            f"{name}: {kept.get(name, ORIGINAL)}" for name in [*kept, *more_captions[:3]]
        )
        told.append(
            f"'caption_fields={{{origins}}}' takes captions from {', '.join(more_captions[:3])}"
        )
    return told


def _role(name: str, image: str | None, fields: FieldNames) -> str:
    if name == image:
        return ", the image"
    return ", a caption" if name in fields.captions or name == "captions" else ""
