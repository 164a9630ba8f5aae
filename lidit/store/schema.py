"""Arrow schemas of a corpus, and the metadata that makes a file readable without this package."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from lidit.errors import InputError

FORMAT_VERSION = 1  # raise when older releases cannot read what is written, or newer ones the old
# of a text family's unit files, which older releases refuse; version 1 has no row checksums
TEXT_VERSION = 2
METADATA_KEY = b"lidit"

CAPTIONS = pa.schema([("text", pa.large_string()), ("sha256", pa.binary(32))])

CAPTION_REFERENCE = pa.struct([("index", pa.int32()), ("origin", pa.string())])
# offset and size let a reader fetch one member of an uncompressed tar; null where the member is
# found another way.
IMAGE_REFERENCE = pa.struct(
    [("file", pa.string()), ("member", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
)
SAMPLES = pa.schema(
    [
        ("key", pa.large_string()),
        ("captions", pa.list_(CAPTION_REFERENCE)),
        ("image", IMAGE_REFERENCE),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bucket", pa.string()),
        ("meta", pa.large_string()),
    ]
)

# what: "sample" (the whole sample is refused), "caption" (the sample goes on without this caption)
# or "file".
QUARANTINE = pa.schema(
    [
        ("key", pa.large_string()),
        ("file", pa.string()),
        ("reason", pa.large_string()),
        ("what", pa.string()),
    ]
)

# buckets: samples of each aspect bucket; the order of training is computed from it without reading
# a row. Never null.
BUCKET_COUNT = pa.struct([("bucket", pa.string()), ("samples", pa.int32())])
UNITS = pa.schema(
    [
        ("unit", pa.int32()),
        ("source", pa.string()),
        ("samples", pa.int32()),
        ("buckets", pa.list_(BUCKET_COUNT)),
        ("captions", pa.int32()),
        ("samples_bytes", pa.int64()),
        ("samples_sha256", pa.string()),
        ("captions_bytes", pa.int64()),
        ("captions_sha256", pa.string()),
    ]
)

RECORDS = pa.schema(
    [
        ("unit", pa.int32()),
        ("file", pa.string()),
        ("rows", pa.int32()),
        ("tokens", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("seconds", pa.float64()),
        ("minimum", pa.float64()),
        ("maximum", pa.float64()),
    ]
)
# Only in the manifests of families whose rows can be read alone: see `lidit.store.row_index`.
ROW_INDEX = pa.field("index", pa.list_(pa.list_(pa.int64())))


def with_metadata(schema: pa.Schema, **facts: Any) -> pa.Schema:
    """The schema, carrying `facts` as canonical JSON under the key `lidit`."""
    return schema.with_metadata(
        {METADATA_KEY: canonical_json({"format": FORMAT_VERSION, **facts}).encode()}
    )


def read_metadata(schema: pa.Schema, where: str) -> dict[str, Any]:
    """What `with_metadata` stored. InputError where it is missing or of another format version."""
    try:
        facts = json.loads((schema.metadata or {})[METADATA_KEY])
        version = facts["format"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{where}: no 'lidit' schema metadata: not a file of a corpus") from None
    if version not in (FORMAT_VERSION, TEXT_VERSION):
        raise InputError(
            f"{where}: format version {version}, this release reads {FORMAT_VERSION} and "
            f"{TEXT_VERSION}"
        )
    return dict(facts)


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN. The text behind every digest."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode("utf-8")).hexdigest()


def seal(facts: dict[str, Any]) -> bytes:
    """`facts` as readable JSON with their own checksum, so that one flipped bit is seen. Lossless:
    `unseal`.
    """
    sealed = {**facts, "checksum": digest_of(facts)}
    return (
        json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode("utf-8")


def unseal(content: bytes) -> dict[str, Any]:
    """What was sealed. Raises ValueError where a byte differs from what was written."""
    facts = json.loads(content)
    if not isinstance(facts, dict):
        raise ValueError("not an object")
    checksum = facts.pop("checksum", None)
    if checksum != digest_of(facts):
        raise ValueError("the checksum differs")
    return facts


def unit_name(unit: int, digits: int) -> str:
    return f"{unit:0{digits}d}"


def unit_digits(units: int) -> int:
    """Digits of a unit number in file names: names sort as numbers do."""
    return max(5, len(str(max(units - 1, 0))))
