"""Was this picture made here? The manifest, the watermark and the log of issued pictures, asked one
after the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lidit.errors import InputError
from lidit.images.decode import BadImageError, decode_image
from lidit.serving.provenance.issued import IssuedFinding, IssuedLog
from lidit.serving.provenance.manifest import Format, ManifestFinding, read_manifest
from lidit.serving.provenance.watermark import Watermark

FORMATS: dict[re.Pattern[bytes], Format] = {
    re.compile(rb"\x89PNG\r\n\x1a\n"): "image/png",
    re.compile(rb"\xff\xd8\xff"): "image/jpeg",
    re.compile(rb"RIFF....WEBP", re.DOTALL): "image/webp",
}
MOST_BYTES = 64 << 20
Answer = Literal["made here", "altered", "unknown"]


@dataclass(frozen=True)
class PictureFinding:
    """What each mark says; those that were not asked for say nothing."""

    manifest: ManifestFinding
    watermark: int | None
    issued: IssuedFinding | None

    @property
    def made_here(self) -> bool:
        """Whether these very bytes were made here, as far as anything says so."""
        return self.answer == "made here"

    @property
    def answer(self) -> Answer:
        """ "made here": a manifest of a trusted signer is whole, or the log holds these very bytes.
        "altered": the bytes are others, but a mark or a likeness in the log leads to a picture made
        here, or a manifest does not fit the file. "unknown": nothing says that it was made here,
        which proves nothing: marks can be removed.
        """
        exact = self.issued is not None and self.issued.match == "exact"
        if self.manifest.state == "trusted" or exact:
            return "made here"
        marked = self.watermark is not None or self.issued is not None
        return "altered" if marked or self.manifest.state == "invalid" else "unknown"


def verify_picture(
    picture: bytes,
    log: IssuedLog | None = None,
    watermark: Watermark | None = None,
    roots: str | None = None,
) -> PictureFinding:
    """What can be said of a file. roots: PEM of the certificates whose signers sign here, and of no
    others.

    Raises InputError for what is no PNG, JPEG or WebP, or is too large; ProvenanceUnavailable for a
    log out of reach.
    """
    kind = _kind(picture)
    manifest = read_manifest(picture, kind, roots)
    try:
        image = np.asarray(decode_image(picture).image)
    except BadImageError as error:
        if manifest.manifest is None:
            raise InputError(
                f"the picture cannot be read ({error}); give the file as it was"
            ) from None
        return PictureFinding(manifest, None, None)  # it was signed once, and damaged since
    mark = watermark.read(image) if watermark else None
    return PictureFinding(manifest, mark, log.find(picture, image, mark) if log else None)


def _kind(picture: bytes) -> Format:
    if len(picture) > MOST_BYTES:
        raise InputError(
            f"the file has {len(picture):,} bytes; at most {MOST_BYTES:,} are looked at"
        )
    kind = next((kind for begins, kind in FORMATS.items() if begins.match(picture)), None)
    if kind is None:
        raise InputError("the file is no PNG, JPEG or WebP picture; give the file as it was")
    return kind
