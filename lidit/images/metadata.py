"""What stands in an image file beside its pixels: read for the orientation alone, taken away where
it is in the way."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# PIL refuses an image whose text is longer (a workflow, a prompt of a model); all texts of one
# image together.
_MAX_TEXT = 1 << 20
_ORIENTATION = 0x0112
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """A loaded image turned as its EXIF says, and what was done. Only the number of the orientation
    counts."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        method = _TRANSPOSED.get(orientation)
    except Exception:  # a damaged EXIF raises almost anything; the pixels are whole
        return image.copy(), ["EXIF cannot be read: taken as upright"]
    if method is None:
        return image.copy(), []
    return image.transpose(method), ["EXIF orientation applied"]


def load_pixels_alone(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """A TIFF loaded and turned by the number of its orientation; PIL writes its EXIF anew, which
    may be impossible."""
    orientation = getattr(image, "tag_v2", {}).get(_ORIENTATION, 1)
    image.load_end = lambda: None  # type: ignore[attr-defined]
    image.load()
    method = _TRANSPOSED.get(orientation)
    return (image.copy(), []) if method is None else (image.transpose(method), [])


def without_texts(content: bytes) -> bytes | None:
    """A PNG without long or damaged texts and profiles, a JPEG without segments that say nothing of
    its pixels.

    None for other files, and where nothing was to be taken away.
    """
    if content.startswith(_PNG):
        made = _png_without_texts(content)
    elif content.startswith(_JPEG):
        made = _jpeg_without_segments(content)
    else:
        return None
    return made if len(made) < len(content) else None


def _png_without_texts(content: bytes) -> bytes:
    kept, total, place = [_PNG], 0, len(_PNG)
    while place + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, place)
        kind = content[place + 4 : place + 8]
        stop = place + 12 + length
        if kind in _TEXT_CHUNKS:
            size = _text_size(kind, content[place + 8 : place + 8 + length])
            if size is None or total + size > _MAX_TEXT:
                place = stop
                continue
            total += size
        kept.append(content[place:stop])
        place = stop
    kept.append(content[place:])
    return b"".join(kept)


def _text_size(kind: bytes, data: bytes) -> int | None:
    """Bytes of a text chunk once unpacked; None above the limit and for one that cannot be
    unpacked."""
    _, _, rest = data.partition(b"\0")
    packed: bytes | None = rest[1:] if kind in (b"zTXt", b"iCCP") else None
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    if packed is None:
        return len(data) if len(data) <= _MAX_TEXT else None
    try:
        text = zlib.decompressobj().decompress(packed, _MAX_TEXT + 1)
    except zlib.error:
        return None
    return len(text) if len(text) <= _MAX_TEXT else None


def _jpeg_without_segments(content: bytes) -> bytes:
    """Without application segments but JFIF, EXIF and Adobe's (which names the colours), and
    without comments."""
    kept, place = [_JPEG], len(_JPEG)
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker == 0xDA or 0xD0 <= marker <= 0xD9:
            break
        (length,) = struct.unpack_from(">H", content, place + 2)
        stop = place + 2 + length
        exif = marker == 0xE1 and content[place + 4 : place + 10] == b"Exif\0\0"
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or marker in (0xE0, 0xEE) or exif:
            kept.append(content[place:stop])
        place = stop
    kept.append(content[place:])
    return b"".join(kept)
