"""A corpus's images, read again from the sources they stayed in.

A source that was changed since ingest must not give other images. Compared on every reading, for it
costs nothing: the size in bytes of each source file and of each picture in a file of its own; name
and size of each member of a tar; the sha256 of a compressed tar, which is read to its end anyway;
each image's width and height. Other bytes of the same sizes in a tar, a table or a picture's file
are not seen here; `lidit verify --sources` reads everything.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lidit.errors import JobError
from lidit.images.buckets import Bucket, fit
from lidit.images.decode import BadImageError, decode_image
from lidit.sources.base import BadRecordError, OpenedSource, SourceFile, open_binary
from lidit.sources.kinds import kind_of
from lidit.sources.tables import image_bytes
from lidit.sources.webdataset_tar import read_members
from lidit.store import Corpus, Crop

MOVED = (
    "put the old file back; where all have moved, run the same lidit ingest with their new place"
)


def bucket_images(
    corpus: Corpus, unit: int, start: int, stop: int, scale: int, max_pixels: int
) -> tuple[list[np.ndarray], list[Crop]]:
    """Images of rows [start, stop) of a unit, fitted to their buckets x scale: uint8 [H, W, 3]
    each, and the crops.

    Raises JobError, naming file and key, where a source is not what was ingested.
    """
    samples = corpus.samples(unit).slice(start, stop - start).to_pylist()
    pixels, crops = [], []
    for sample, content in zip(samples, _contents(corpus, samples), strict=True):
        try:
            image = decode_image(content, max_pixels).image
        except BadImageError as error:
            raise _changed(corpus, sample, str(error)) from None
        if image.size != (sample["width"], sample["height"]):
            raise _changed(corpus, sample, f"is {image.width}x{image.height} now")
        bucket = Bucket.parse(sample["bucket"])
        fitted, crop = fit(image, Bucket(bucket.width * scale, bucket.height * scale))
        pixels.append(np.asarray(fitted))
        crops.append(crop)
    return pixels, crops


def unit_images(corpus: Corpus, unit: int) -> Iterator[bytes]:
    """The image files of a unit's samples as they are in their sources, in order. Raises JobError
    like the above.
    """
    yield from _contents(corpus, corpus.samples(unit).to_pylist())


def _changed(
    corpus: Corpus, sample: dict[str, Any], why: str, remedy: str = "put the old file back"
) -> JobError:
    place = f"{corpus.image_path(sample['image']['file'])} {sample['image']['member']}".strip()
    return JobError(
        f"{place}: sample {sample['key']} is not what was ingested ({why}); {remedy}, or "
        "ingest anew"
    )


def _contents(corpus: Corpus, samples: Sequence[dict[str, Any]]) -> Iterator[bytes]:
    """Image bytes in the order of the samples; one open file at a time."""
    opened: BinaryIO | None = None
    path = ""
    whole: dict[str, bytes] | None = None
    try:
        for sample in samples:
            reference = sample["image"]
            try:
                if reference["offset"] is None:
                    whole = whole if whole is not None else _members(corpus, samples)
                    yield whole[reference["member"]]
                    continue
                if opened is None or corpus.image_path(reference["file"]) != path:
                    if opened is not None:
                        opened.close()
                    path = corpus.image_path(reference["file"])
                    opened = open_binary(path)
                    _check_size(opened, corpus, reference)
                if reference["member"]:
                    _check_header(opened, reference)
                opened.seek(reference["offset"])
                yield opened.read(reference["size"])
            except OSError as error:
                raise _changed(corpus, sample, f"cannot be read: {error}", MOVED) from None
            except (KeyError, EOFError, tarfile.TarError, zlib.error, pa.ArrowException) as error:
                raise _changed(corpus, sample, f"cannot be read: {error!r}") from None
            except BadRecordError as error:
                raise _changed(corpus, sample, str(error)) from None
    finally:
        if opened is not None:
            opened.close()


def _recorded(corpus: Corpus, reference: dict[str, Any], column: str) -> Any:
    """What the table of sources says about an image's file; None for a picture in a file of its
    own.
    """
    row = pc.index(corpus.sources["file"], reference["file"]).as_py()
    return None if row < 0 else corpus.sources[column][row].as_py()


def _check_size(file: BinaryIO, corpus: Corpus, reference: dict[str, Any]) -> None:
    """Raise BadRecordError where a source file, or a picture in a file of its own, has another size
    than it had.
    """
    recorded = _recorded(corpus, reference, "bytes")
    size = reference["size"] if recorded is None else recorded
    found = file.seek(0, os.SEEK_END)
    file.seek(0)
    if found != size:
        raise BadRecordError(f"the file has {found} bytes now, it had {size}")


def _check_header(file: BinaryIO, reference: dict[str, Any]) -> None:
    """Raise BadRecordError where a tar member's own header names another member or size.

    A tar is padded to whole blocks, so another one of the same size is likely.
    """
    name, size = reference["member"], reference["size"]
    file.seek(reference["offset"] - tarfile.BLOCKSIZE)
    try:
        header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise BadRecordError("it is not where it was in the tar") from None
    # Other names may stand in front of the header, in full.
    if header.size != size or (
        header.name != name and name.isascii() and len(name) <= tarfile.LENGTH_NAME
    ):
        raise BadRecordError(
            f"in its place is {header.name!r} of {header.size} bytes, it had {size}"
        )


def _members(corpus: Corpus, samples: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Members without an offset: of a compressed tar (read from its start), or rows of a table."""
    references = [sample["image"] for sample in samples if sample["image"]["offset"] is None]
    path = corpus.image_path(references[0]["file"])
    names = [reference["member"] for reference in references]
    if kind_of(path) == "tar":  # a gzipped one: the members of others have offsets
        opened = OpenedSource(SourceFile("tar", path, references[0]["file"], 0, ""))
        with opened.stream() as stream:
            found = dict(read_members(stream, set(names)))
            opened.finish()
        if opened.sha256_read != _recorded(corpus, references[0], "sha256"):
            raise BadRecordError("the file's bytes are others: its sha256 differs")
        return found
    with open_binary(path) as file:
        _check_size(file, corpus, references[0])
    column = names[0].rpartition("#")[0]
    rows = {int(name.rpartition("#")[2]) for name in names}
    return {f"{column}#{row}": content for row, content in image_bytes(path, column, rows)}
