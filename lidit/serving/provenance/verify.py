"""Was this picture made here? The manifest, the watermark and the log of issued pictures, asked one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from lidit.serving.provenance.issued import IssuedFinding, IssuedLog
from lidit.serving.provenance.manifest import ManifestFinding
from lidit.serving.provenance.watermark import Watermark


@dataclass(frozen=True)
class PictureFinding:
    """made_here: a trusted manifest, our watermark, or an entry of the log says so. tampered: a manifest is there and
    does not fit the bytes, or the log holds the picture's likeness with other bytes and no mark explains it."""

    manifest: ManifestFinding
    watermark: int | None
    issued: IssuedFinding | None

    @property
    def made_here(self) -> bool:
        raise NotImplementedError


def verify_picture(
    picture: bytes, log: IssuedLog | None = None, watermark: Watermark | None = None, roots: str | None = None
) -> PictureFinding:
    """What can be said of a file. Raises InputError for what is no PNG, JPEG or WebP of reasonable size."""
    raise NotImplementedError
