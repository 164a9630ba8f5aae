"""Metadata never decides about pixels: a whole picture is taken whatever stands beside it in its
file."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lidit.images import BadImageError, decode_image
from tests.helpers.pictures import encoded, picture


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(decode_image(content).image)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes) -> bytes:
    """A picture of 24 x 16 with these chunks behind its header."""
    plain = encoded(picture(24, 16))
    return plain[:33] + b"".join(chunks) + plain[33:]


UPRIGHT = np.asarray(picture(24, 16))
LONG = b"workflow " * 300_000


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"prompt\0" + LONG),
        chunk(b"zTXt", b"prompt\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + b"no zlib"),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(LONG)),
        chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
    ],
    ids=["tEXt", "zTXt", "iTXt", "broken iTXt", "profile", "many"],
)
def test_long_and_broken_texts_of_a_png_are_skipped(extra: bytes) -> None:
    assert np.array_equal(pixels(png_with(extra)), UPRIGHT)


def test_the_orientation_survives_beside_a_long_text() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = chunk(b"eXIf", exif.tobytes()[6:])
    decoded = decode_image(png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(LONG)), turned))
    assert decoded.image.size == (16, 24)
    assert np.array_equal(np.asarray(decoded.image), np.rot90(UPRIGHT, -1))
    assert decoded.notes == ("EXIF orientation applied",)


def tiff_tags(order: str, *entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block: (tag, type, count, value) with values of more than four bytes behind the
    table."""
    mark, start = (b"MM", ">") if order == "MM" else (b"II", "<")
    place, body = 8 + 2 + 12 * len(entries) + 4, b""
    table = mark + struct.pack(f"{start}HI", 42, 8) + struct.pack(f"{start}H", len(entries))
    for tag, kind, count, value in sorted(entries):
        held = (
            value.ljust(4, b"\0")
            if len(value) <= 4
            else struct.pack(f"{start}I", place + len(body))
        )
        table += struct.pack(f"{start}HHI", tag, kind, count) + held
        body += value if len(value) > 4 else b""
    return b"Exif\0\0" + table + bytes(4) + body


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize(
    "odd",
    [
        (0x0128, 2, 5, b"inch\0"),  # resolution unit as a text
        (0x010F, 5, 1, struct.pack("<II", 7, 2)),  # maker as a fraction
        (0x011B, 10, 1, struct.pack("<ii", -72, 1)),  # a negative resolution
        (0x9286, 12, 1, struct.pack("<d", 0.5)),  # a comment as a number
    ],
)
def test_only_the_number_of_the_orientation_counts(
    kind: str, odd: tuple[int, int, int, bytes]
) -> None:
    exif = tiff_tags("II", (0x0112, 3, 1, struct.pack("<H", 8)), odd)
    stored = Image.new("RGB", (32, 16), "red")
    decoded = decode_image(encoded(stored, kind, exif=exif))
    assert decoded.image.size == (16, 32)
    assert decoded.notes == ("EXIF orientation applied",)


def test_an_orientation_that_is_none_changes_nothing() -> None:
    for number in (0, 9, 77):
        exif = tiff_tags("MM", (0x0112, 3, 1, struct.pack(">H", number)))
        decoded = decode_image(encoded(picture(24, 16), "PNG", exif=exif))
        assert (decoded.image.size, decoded.notes) == ((24, 16), ())
        assert np.array_equal(np.asarray(decoded.image), UPRIGHT)


def test_broken_exif_leaves_the_picture_as_it_is_stored() -> None:
    decoded = decode_image(png_with(chunk(b"eXIf", b"MM\0\x2a" + b"\xff" * 40)))
    assert np.array_equal(np.asarray(decoded.image), UPRIGHT)
    decoded = decode_image(png_with(chunk(b"eXIf", b"no tiff at all")))
    assert np.array_equal(np.asarray(decoded.image), UPRIGHT)
    assert decoded.notes == ("EXIF cannot be read: taken as upright",)


def test_a_jpeg_with_broken_segments_is_read_and_keeps_its_colours() -> None:
    plain = encoded(Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK"), "JPEG", quality=95)
    bad = b"\xff\xe2" + struct.pack(">H", 2 + 16) + b"MPF\0" + b"II\x2a\0" + b"\xff" * 8
    assert np.abs(pixels(plain[:2] + bad + plain[2:]).mean((0, 1)) - [220, 30, 40]).max() < 6


def test_broken_pixels_stay_refused_whatever_stands_beside_them() -> None:
    whole = encoded(picture(400, 300))
    cut = whole[:33] + chunk(b"tEXt", b"prompt\0" + LONG) + whole[33:-3000]
    with pytest.raises(BadImageError, match="broken image"):
        decode_image(cut)
