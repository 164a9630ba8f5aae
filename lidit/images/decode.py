"""Safe decoding: every image that comes out is 8-bit RGB, upright, opaque; everything else is
refused with a reason.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from lidit.errors import one_line
from lidit.images.metadata import load_pixels_alone, upright, without_texts

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff")
DEFAULT_MAX_PIXELS = 64_000_000


class BadImageError(Exception):
    """The bytes are no image this package takes; the message is the reason, for a
    quarantine row.
    """


@dataclass(frozen=True)
class DecodedImage:
    """image: PIL, mode RGB, EXIF orientation applied. notes: what was changed on the
    way, in words.
    """

    image: Image.Image
    notes: tuple[str, ...]


def decode_image(content: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> DecodedImage:
    """Decode completely. Alpha is laid on white, 16 bits become 8, the first frame of an animation
    is taken.

    Raises BadImageError for anything broken, truncated, not one of FORMATS, or (by its header)
    above `max_pixels`.
    """
    if not content:
        raise BadImageError("broken image: zero bytes")
    try:
        try:
            return _decode(content, max_pixels)
        except (BadImageError, Image.DecompressionBombError):
            raise
        except Exception:
            # What was in the way may be a text, a profile or a tag: the pixels decide. None of it
            # left, the same again.
            bare = without_texts(content)
            try:
                return _decode(content if bare is None else bare, max_pixels, pixels_alone=True)
            except BadImageError:
                raise
            except Exception:
                pass
            raise
    except BadImageError:
        raise
    except Image.DecompressionBombError:
        raise BadImageError(
            f"image too large: more pixels than PIL accepts; max_pixels={max_pixels}"
        ) from None
    except UnidentifiedImageError:
        raise BadImageError(f"broken image: not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise almost anything on hostile bytes
        # Without object addresses: the same bytes must give the same reason in every process.
        reason = re.sub(r" at 0x[0-9a-f]+", "", one_line(error))
        raise BadImageError(f"broken image: {reason or type(error).__name__}") from None


def _decode(content: bytes, max_pixels: int, pixels_alone: bool = False) -> DecodedImage:
    with warnings.catch_warnings():
        # PIL warns of large images and odd metadata; the checks here decide
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImageError(
                    f"image too large: {width}x{height} is more than max_pixels={max_pixels}"
                )
            notes = []
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                image.seek(0)
                notes.append(f"animated: first of {frames} frames")
            if pixels_alone and image.format == "TIFF":
                turned, note = load_pixels_alone(image)
            else:
                image.load()
                turned, note = upright(image)
            rgb, more = _to_rgb(turned)
    return DecodedImage(rgb, tuple(notes + note + more))


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, []
    if image.mode == "F":
        raise BadImageError("unsupported pixels: floating point, whose range is not defined")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImageError("unsupported pixels: more than 16 bits per channel")
        grey = np.round(values / 257).astype(np.uint8)
        return Image.fromarray(grey, "L").convert("RGB"), ["16-bit greyscale reduced to 8 bits"]
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB"), ["alpha laid on white"]
    return image.convert("RGB"), [f"converted from {image.mode}"]
