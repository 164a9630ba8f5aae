"""The watermark is not seen, is read after JPEG and a crop, and says so where there is no room for
it.
"""

from __future__ import annotations

import numpy as np
import pytest

from lidit.serving.provenance.watermark import LEAST_SIDE, NoRoom, Watermark
from tests.helpers.marked_pictures import Image, compressed, cropped, even, photo, scene

MARK = Watermark(b"a secret")
PAYLOAD = 0xC0FFEE42
PICTURES = {
    "photo": photo(256),
    "scene": scene(256),
    "white": even(256),
    "black": even(256, 0),
    "wide": photo(512)[:300],
}


def bits_read(image: Image, payload: int) -> float:
    """The share of the payload's bits that are right, at the best place."""
    truth = np.unpackbits(np.frombuffer(payload.to_bytes(4, "big"), np.uint8))
    return float(((MARK.soft_bits(image)[:, :32] < 0) == truth).mean(1).max())


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_a_mark_is_not_seen_and_lasts(picture: Image) -> None:
    marked = MARK.embed(picture, PAYLOAD)
    assert marked.shape == picture.shape
    difference = marked.astype(float) - picture
    assert 10 * np.log10(255**2 / (difference**2).mean()) > 34  # dB
    assert np.abs(difference).max() < 40
    for change in (
        lambda image: image,
        compressed,
        cropped,
        lambda image: compressed(cropped(image)),
    ):
        assert MARK.read(change(marked)) == PAYLOAD


@pytest.mark.parametrize("make", [photo, scene], ids=["photo", "scene"])
def test_bits_are_right_after_a_crop_and_jpeg(make: object) -> None:
    shares = []
    for number in range(6):
        picture = scene(256, number) if make is scene else cropped(photo(512), 0.5, number)
        payload = int(np.random.default_rng(number).integers(1 << 32))
        shares.append(
            bits_read(compressed(cropped(MARK.embed(picture, payload), seed=number)), payload)
        )
    assert np.mean(shares) >= 0.95


def test_every_payload_is_carried() -> None:
    picture = photo(256)
    for payload in (0, 1, 0xFFFFFFFF, 0x80000000, 0x12345678):
        assert MARK.read(MARK.embed(picture, payload)) == payload
    for payload in (-1, 1 << 32):
        with pytest.raises(ValueError, match="32 bits"):
            MARK.embed(picture, payload)


def test_pictures_without_a_mark_have_none() -> None:
    pictures = [
        *PICTURES.values(),
        *(scene(256, seed) for seed in range(20)),
        *(photo(side) for side in (128, 300)),
    ]
    random = np.random.default_rng(0)
    noise = [random.integers(0, 256, (256, 256, 3), np.uint8) for _ in range(20)]
    assert [MARK.read(picture) for picture in [*pictures, *noise]] == [None] * (
        len(pictures) + len(noise)
    )


def test_another_secret_reads_nothing() -> None:
    marked = MARK.embed(photo(256), PAYLOAD)
    assert Watermark(b"another secret").read(marked) is None
    assert Watermark(b"a secret").read(marked) == PAYLOAD


@pytest.mark.parametrize(("height", "width"), [(32, 32), (255, 512), (512, 255)])
def test_a_small_picture_says_that_it_has_no_room(height: int, width: int) -> None:
    with pytest.raises(NoRoom, match=f"{height} x {width} pixels: a watermark needs {LEAST_SIDE}"):
        MARK.embed(photo(512)[:height, :width], PAYLOAD)
    assert MARK.read(photo(512)[:32, :32]) is None


def test_what_it_does_not_last_through_is_known() -> None:
    marked = MARK.embed(photo(256), PAYLOAD)
    assert MARK.read(marked[::2, ::2]) is None  # scaling
    assert MARK.read(np.rot90(marked).copy()) is None
