"""A corpus's images, read again from the sources they stayed in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from lidit.errors import JobError
from lidit.images.buckets import Bucket, fit
from lidit.images.decode import BadImageError, decode_image
from lidit.sources.base import open_binary
from lidit.sources.tables import image_bytes
from lidit.sources.webdataset_tar import read_members
from lidit.store import Corpus, Crop


def bucket_images(
    corpus: Corpus, unit: int, start: int, stop: int, scale: int, max_pixels: int
) -> tuple[list[np.ndarray], list[Crop]]:
    """Images of rows [start, stop) of a unit, fitted to their buckets x scale: uint8 [H, W, 3] each, and the crops.

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
    """The image files of a unit's samples as they are in their sources, in order. Raises JobError like the above."""
    yield from _contents(corpus, corpus.samples(unit).to_pylist())


def _changed(corpus: Corpus, sample: dict[str, Any], why: str) -> JobError:
    place = f"{corpus.image_path(sample['image']['file'])} {sample['image']['member']}".strip()
    return JobError(
        f"{place}: sample {sample['key']} is not what was ingested ({why}); put the old file back, or ingest anew"
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
                opened.seek(reference["offset"])
                yield opened.read(reference["size"])
            except (OSError, KeyError) as error:
                raise _changed(corpus, sample, f"cannot be read: {error}") from None
    finally:
        if opened is not None:
            opened.close()


def _members(corpus: Corpus, samples: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Members without an offset: of a compressed tar (read from its start), or rows of a table."""
    references = [sample["image"] for sample in samples if sample["image"]["offset"] is None]
    path = corpus.image_path(references[0]["file"])
    names = [reference["member"] for reference in references]
    if path.endswith((".tgz", ".gz")):
        with open_binary(path) as file:
            return dict(read_members(file, True, set(names)))
    column = names[0].rpartition("#")[0]
    rows = {int(name.rpartition("#")[2]) for name in names}
    return {f"{column}#{row}": content for row, content in image_bytes(path, column, rows)}
