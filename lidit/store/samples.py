"""Samples as Python values and as the Arrow tables of one unit."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from lidit.store.schema import CAPTIONS, QUARANTINE, SAMPLES, with_metadata


@dataclass(frozen=True)
class ImageReference:
    """Where an image's bytes are: a source file (relative to the corpus's root) and the member
    inside it.

    offset and size are set where the member can be read on its own, as in an uncompressed tar.
    """

    file: str
    member: str
    offset: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Sample:
    """One accepted sample: captions are (text, origin) pairs; without an image its four fields are
    None.
    """

    key: str
    captions: tuple[tuple[str, str], ...]
    image: ImageReference | None = None
    width: int | None = None
    height: int | None = None
    bucket: str | None = None
    meta: str = "{}"


@dataclass(frozen=True)
class Refusal:
    """One quarantine row. what: "sample", "caption" or "file"."""

    key: str
    file: str
    reason: str
    what: str = "sample"


def normalise(text: str) -> str:
    """The form in which captions are stored, compared and hashed."""
    return unicodedata.normalize("NFC", text)


def caption_digest(text: str) -> bytes:
    """sha256 of the NFC text: a caption's identity across units, corpora and machines."""
    return hashlib.sha256(normalise(text).encode("utf-8")).digest()


def unit_tables(samples: Sequence[Sample]) -> tuple[pa.Table, pa.Table]:
    """`samples/` and `captions/` of one unit. Captions are distinct, in order of
    first appearance.
    """
    index: dict[str, int] = {}
    for sample in samples:
        for text, _ in sample.captions:
            index.setdefault(normalise(text), len(index))
    texts = list(index)
    captions = pa.table(
        [
            pa.array(texts, pa.large_string()),
            pa.array([caption_digest(t) for t in texts], pa.binary(32)),
        ],
        schema=with_metadata(CAPTIONS, kind="captions"),
    )
    columns = {
        "key": [s.key for s in samples],
        "captions": [
            [{"index": index[normalise(t)], "origin": o} for t, o in s.captions] for s in samples
        ],
        "image": [s.image and vars(s.image) for s in samples],
        "width": [s.width for s in samples],
        "height": [s.height for s in samples],
        "bucket": [s.bucket for s in samples],
        "meta": [s.meta for s in samples],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SAMPLES]
    return pa.table(arrays, schema=with_metadata(SAMPLES, kind="samples")), captions


def printable(text: str) -> str:
    """Bytes that are no UTF-8, and NUL, written out as \\udce9 and \\0: Arrow and JSON files refuse
    the former.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\0")


def quarantine_table(refusals: Sequence[Refusal]) -> pa.Table:
    """Refusals as rows. Names in them may be any bytes: what is wrong with a file is often its
    name.
    """
    arrays = [
        pa.array([printable(getattr(r, field.name)) for r in refusals], field.type)
        for field in QUARANTINE
    ]
    return pa.table(arrays, schema=with_metadata(QUARANTINE, kind="quarantine"))
