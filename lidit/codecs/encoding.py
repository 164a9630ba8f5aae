"""A latents family's contents from one codec: the chunks of a unit, and the tables of their
latents.

Needs no cluster: `pipelines.corpus.latents` calls this from its actors, a notebook may call it in a
loop over units, with the pixels of `lidit.sources.reading.bucket_images`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from lidit.codecs.codec import Codec
from lidit.errors import InputError
from lidit.images.buckets import Bucket
from lidit.pixels import from_bytes
from lidit.store import Corpus, Crop, UnitStatistics, latents_table

CHUNK_PIXELS = 64 * 512 * 512  # decoded at once: 48 MiB of pixels
# One forward pass of the codec: fills a GPU; on a CPU more than its cache holds halves the rate.
BATCH_PIXELS = {"cuda": 16 * 512 * 512, "cpu": 4 * 128 * 128}
# Images [H, W, 3] uint8 in the order of their rows, and where each was cut.
Pixels = tuple[Sequence[np.ndarray], Sequence[Crop]]


def check_buckets(corpus: Corpus, factor: int, scale: int) -> None:
    """InputError where a codec of this downsampling factor cannot encode the corpus's images at
    `scale`.
    """
    first = next((u for u in range(corpus.num_units) if corpus.units["samples"][u].as_py()), None)
    if first is None or corpus.samples(first)["bucket"][0].as_py() is None:
        raise InputError(
            f"{corpus.folder.location}: a corpus of captions only: there are no images to encode"
        )
    multiple = int(corpus.facts["settings"].get("bucket_multiple", 1))
    if multiple * scale % factor:
        raise InputError(
            f"{corpus.folder.location}: bucket sides are multiples of {multiple * scale}, the "
            "codec needs multiples of "
            f"{factor}; ingest again with bucket_multiple={factor} x the model's patch size"
        )


def unit_chunks(corpus: Corpus, unit: int, scale: int = 1) -> list[tuple[int, int]]:
    """(start, stop): consecutive rows of about CHUNK_PIXELS, a function of the corpus alone."""
    buckets = [Bucket.parse(text) for text in corpus.samples(unit)["bucket"].to_pylist()]
    chunks, start, area = [], 0, 0
    for row, bucket in enumerate(buckets):
        pixels = bucket.width * bucket.height * scale**2
        if row > start and area + pixels > CHUNK_PIXELS:
            chunks.append((start, row))
            start, area = row, 0
        area += pixels
    return [*chunks, (start, len(buckets))]


@dataclass(frozen=True)
class BatchOnItsWay:
    """A batch that is being encoded. mean, deviation: [B, C, h, w], to be looked at after
    `copied`.
    """

    rows: list[int]
    mean: torch.Tensor
    deviation: torch.Tensor | None
    copied: torch.cuda.Event | None


class LatentEncoder:
    """A codec at work. `codec_seconds` is the time it has computed since it was last
    set to zero.
    """

    def __init__(self, codec: Codec, device: str = "cpu") -> None:
        self.codec, self.device = codec, device
        self.codec_seconds = 0.0

    def tables(self, chunks: Iterable[Pixels], statistics: UnitStatistics) -> Iterator[pa.Table]:
        """The rows of one unit in order, a table per chunk; fills `statistics`. chunks: pixels of
        `unit_chunks`.
        """
        for pixels, crops in chunks:
            means, deviations = self.encode(pixels)
            statistics.add(means)
            yield latents_table(means, crops, self.codec.storage, deviations)

    def encode(
        self, pixels: Sequence[np.ndarray]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Means and deviations of images [H, W, 3] in their order; batches hold one shape and
        depend on `pixels` alone.

        Deviations are None for a codec without a posterior.
        """
        rows_of_shape: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(pixels):
            rows_of_shape.setdefault(image.shape, []).append(row)
        means: dict[int, torch.Tensor] = {}
        deviations: dict[int, torch.Tensor] = {}
        begun: deque[BatchOnItsWay] = deque()
        at_once = 1 if self.device == "cpu" else 2  # a GPU has the next batch before it needs it

        def finish_until(most: int) -> None:
            while len(begun) > most:
                done = begun.popleft()
                mean, deviation = self._finish(done)
                means.update(zip(done.rows, mean, strict=True))
                if deviation is not None:
                    deviations.update(zip(done.rows, deviation, strict=True))

        for (height, width, _), rows in rows_of_shape.items():
            size = max(1, BATCH_PIXELS[self.device] // (height * width))
            for first in range(0, len(rows), size):
                begun.append(self._begin(rows[first : first + size], pixels))
                finish_until(at_once - 1)
        finish_until(0)
        in_order = [means[row] for row in range(len(pixels))]
        return in_order, [deviations[row] for row in range(len(pixels))] if deviations else None

    def _begin(self, rows: list[int], pixels: Sequence[np.ndarray]) -> BatchOnItsWay:
        """Encode images of one shape; on a GPU everything is queued and nothing waited for."""
        began, on_gpu = time.monotonic(), self.device != "cpu"
        stacked = torch.from_numpy(np.stack([pixels[row] for row in rows]))  # [B, H, W, 3]
        if on_gpu:
            stacked = stacked.pin_memory()
        # [B, 3, H, W]
        images = from_bytes(stacked.to(self.device, non_blocking=True).permute(0, 3, 1, 2))
        encoded = self.codec.encode(images)
        mean, deviation = encoded.mean, encoded.deviation
        copied = None
        if on_gpu:
            mean = _on_its_way(mean)
            deviation = None if deviation is None else _on_its_way(deviation)
            copied = torch.cuda.Event()
            copied.record()
        self.codec_seconds += time.monotonic() - began
        return BatchOnItsWay(rows, mean, deviation, copied)

    def _finish(self, batch: BatchOnItsWay) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Means and deviations [B, C, h, w], on the CPU."""
        began = time.monotonic()
        if batch.copied is not None:
            batch.copied.synchronize()
        self.codec_seconds += time.monotonic() - began
        return batch.mean, batch.deviation


def _on_its_way(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory: there when the GPU has come to it."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
