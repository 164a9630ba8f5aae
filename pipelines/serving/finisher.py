"""From pixels to the file a client gets: looked at, marked, encoded, signed. The order matters: a
signature covers the final bytes, and what was not looked at never becomes a file.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lidit.serving.guards.guard import Guard
from lidit.serving.provenance.manifest import Format, ManifestSigner, ProvenanceUnavailable
from lidit.serving.provenance.watermark import LEAST_SIDE, NoRoom, Watermark
from pipelines.serving.checks import demand
from pipelines.serving.errors import ApiError
from pipelines.serving.orders import Delivery

QUALITY = 90  # of jpeg and webp unless the client says otherwise
KINDS: dict[str, Format] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
Pixels = NDArray[np.uint8]  # [height, width, 3]


@dataclass(frozen=True)
class File:
    """A picture's final bytes, and by what it will be known again. model: digest of the weights
    that drew it, which during an update are not everybody's; mark: the watermark's payload.
    """

    data: bytes
    sha256: str
    model: str
    mark: int | None = None
    manifest: str | None = None


class Finisher:
    """guard: of images; watermark, signer: None where settings ask for none."""

    def __init__(
        self,
        digest: str,
        guard: Guard[Pixels] | None = None,
        watermark: Watermark | None = None,
        signer: ManifestSigner | None = None,
    ) -> None:
        self.digest, self.guard, self.watermark, self.signer = digest, guard, watermark, signer

    async def preview(self, pixels: Pixels, delivery: Delivery) -> bytes:
        """A preview: looked at like a picture, but no more than a preview."""
        await demand(self.guard, [pixels], "picture")
        return await asyncio.to_thread(encode, pixels, delivery)

    async def finish(self, pixels: Pixels, delivery: Delivery, title: str) -> File:
        """The file of a picture. Raises ApiError where it is refused, or cannot be looked at or
        marked.
        """
        await demand(self.guard, [pixels], "picture")
        try:
            return await asyncio.to_thread(self._marked, pixels, delivery, title)
        except ProvenanceUnavailable:
            unmarked = "the picture could not be marked as generated, so it is not delivered"
            raise ApiError.of(503, "provenance_unavailable", unmarked) from None

    def _marked(self, pixels: Pixels, delivery: Delivery, title: str) -> File:
        mark = None
        if self.watermark is not None and min(pixels.shape[:2]) >= LEAST_SIDE:
            mark = secrets.randbits(32)
            try:
                pixels = self.watermark.embed(pixels, mark)
            except NoRoom:
                mark = None
        data, manifest = encode(pixels, delivery), None
        if self.signer is not None:
            data, manifest = self.signer.sign(data, KINDS[delivery.format], title, self.digest)
        return File(data, hashlib.sha256(data).hexdigest(), self.digest, mark, manifest)


def encode(pixels: Pixels, delivery: Delivery) -> bytes:
    """The file alone: no metadata, and so no prompt in it."""
    file = io.BytesIO()
    quality = {}
    if delivery.format != "png":
        quality["quality"] = QUALITY if delivery.compression is None else delivery.compression
    Image.fromarray(pixels).save(file, delivery.format.upper(), **quality)
    return file.getvalue()
