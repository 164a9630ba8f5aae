"""The register of pictures that were made here, and what can be said of one that
somebody brings.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lidit.errors import InputError
from lidit.serving.provenance.issued import IssuedLog
from lidit.serving.provenance.manifest import ProvenanceUnavailable
from lidit.serving.provenance.verify import verify_picture
from lidit.serving.provenance.watermark import Watermark
from pipelines.serving.errors import ApiError, invalid
from pipelines.serving.finisher import File

FILE = "issued.sqlite"


class Register:
    """roots: PEM text of the certificates whose signatures are trusted."""

    def __init__(
        self, folder: Path, watermark: Watermark | None = None, roots: str | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = IssuedLog(folder / FILE, create=True)
        self.watermark, self.roots = watermark, roots

    def add(self, file: File, request: str) -> None:
        """Note a picture before it is delivered. Raises ProvenanceUnavailable where that fails."""
        with Image.open(io.BytesIO(file.data)) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.log.add(file.data, pixels, request, file.mark)

    def verify(self, data: bytes) -> dict[str, Any]:
        """Whether a picture was made here, and by what it is known. Raises ApiError 400 for what is
        no picture.
        """
        try:
            found = verify_picture(data, self.log, self.watermark, self.roots)
        except InputError as error:
            raise invalid(str(error), "body", "invalid_image") from None
        except ProvenanceUnavailable:
            raise ApiError.of(
                503, "provenance_unavailable", "the register cannot be read at the moment"
            ) from None
        return {
            "answer": found.answer.replace(" ", "_"),
            "manifest": {"state": found.manifest.state, "reason": found.manifest.reason},
            "watermark": found.watermark is not None,
            "register": None if found.issued is None else found.issued.match,
        }
