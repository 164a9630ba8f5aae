"""Every way a picture can be stored comes out upright, opaque, 8-bit RGB; what cannot is refused
with a reason.
"""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from lidit.images import BadImageError, Bucket, Buckets, decode_image, fit
from tests.helpers.pictures import bomb, encoded, picture


def pixels(content: bytes) -> np.ndarray:
    decoded = decode_image(content).image
    assert decoded.mode == "RGB"
    return np.asarray(decoded).astype(int)


REFERENCE = np.asarray(picture()).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_are_exact(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels(encoded(picture(), kind, **options)), REFERENCE)


def test_jpeg_is_close() -> None:
    assert (
        np.abs(pixels(encoded(picture(), "JPEG", quality=95, subsampling=0)) - REFERENCE).mean() < 6
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = picture(24, 16)
    stored = {
        1: upright,
        2: ImageOps.mirror(upright),
        3: upright.rotate(180),
        4: ImageOps.flip(upright),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(decoded.image), np.asarray(upright))
    assert bool(decoded.notes) == (orientation != 1)


def test_alpha_is_laid_on_white_in_every_form() -> None:
    rgba = picture().convert("RGBA")
    rgba.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))))
    alpha = np.asarray(rgba)[..., 3:].astype(float) / 255
    expected = np.asarray(rgba)[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(encoded(rgba)) - expected).max() <= 1
    grey = rgba.convert("LA")
    expected = np.asarray(grey)[..., :1] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(encoded(grey)) - expected).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert pixels(encoded(palette, transparency=1)).min() == 255
    keyed = Image.new("RGB", (4, 4), (10, 20, 30))
    assert pixels(encoded(keyed, transparency=(10, 20, 30))).min() == 255


def test_palette_greyscale_and_bilevel() -> None:
    palette = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    grey = picture().convert("L")
    assert np.array_equal(pixels(encoded(grey))[..., 1], np.asarray(grey))
    assert set(np.unique(pixels(encoded(picture().convert("1"))))) <= {0, 255}


def test_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK")
    mean = pixels(encoded(red, "JPEG", quality=95)).mean((0, 1))
    assert np.abs(mean - [220, 30, 40]).max() < 6


def test_sixteen_bits_become_eight_by_scaling_not_clipping() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        content = encoded(Image.fromarray(ramp), kind)
        assert np.abs(pixels(content)[..., 0] - ramp / 257).max() <= 0.51
    assert "16-bit" in decode_image(encoded(Image.fromarray(ramp))).notes[0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame_and_say_so(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    decoded = decode_image(content)
    assert np.array_equal(np.asarray(decoded.image)[0, 0], [255, 0, 0])
    assert any("first of 3 frames" in note for note in decoded.notes)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero bytes"),
        (b"no image", "broken image"),
        (encoded(picture(400, 300))[:-2000], "broken image"),
        (encoded(picture(400, 300), "JPEG")[:3000], "broken image"),
        (bomb(), "too large"),
        (bomb(9000, 9000), "too large"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating point"),
        (encoded(picture(), "PPM"), "broken image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "broken image"),
    ],
)
def test_what_is_no_good_image_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_image(content)


def test_max_pixels_is_the_limit_of_the_setting() -> None:
    content = encoded(picture(40, 30))
    assert decode_image(content, 1200).image.size == (40, 30)
    with pytest.raises(BadImageError, match="max_pixels=1199"):
        decode_image(content, 1199)


@pytest.mark.parametrize(("resolution", "multiple"), [(32, 8), (256, 16), (512, 32), (1024, 16)])
def test_buckets_have_the_base_area_and_cover_the_aspect_ratios(
    resolution: int, multiple: int
) -> None:
    buckets = Buckets(resolution, multiple)
    assert Bucket(resolution, resolution) in buckets.all
    for bucket in buckets.all:
        assert bucket.width % multiple == bucket.height % multiple == 0
        assert Bucket(bucket.height, bucket.width) in buckets.all
        assert max(bucket.width, bucket.height) <= 4 * min(bucket.width, bucket.height)
        assert abs(bucket.width * bucket.height / resolution**2 - 1) < 0.26
    assert buckets.closest(500, 500) == Bucket(resolution, resolution)
    wide = buckets.closest(1000, 300)
    assert abs(wide.width / wide.height / (10 / 3) - 1) < 0.35
    brute = min(buckets.all, key=lambda b: abs(np.log(b.width / b.height) - np.log(640 / 480)))
    chosen = buckets.closest(640, 480)
    assert chosen.width / chosen.height == pytest.approx(brute.width / brute.height)
    assert Bucket.parse(str(chosen)) == chosen


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (10, 10), (32, 32)])
def test_fit_covers_the_bucket_from_the_centre(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "black")
    image.paste("white", (size[0] // 2, 0, size[0], size[1]))
    fitted, crop = fit(image, Bucket(32, 32))
    assert fitted.size == (32, 32)
    values = np.asarray(fitted.convert("L")).astype(int)
    assert values[:, :14].max() < 30
    assert values[:, 18:].min() > 225
    short = min(size)
    assert (crop.width, crop.height) == (short, short)
    assert abs(2 * crop.left + crop.width - size[0]) <= 1
    assert abs(2 * crop.top + crop.height - size[1]) <= 1


def test_image_of_the_bucket_size_is_untouched() -> None:
    image = picture(32, 32)
    assert fit(image, Bucket(32, 32))[0].tobytes() == image.tobytes()
    assert Image.open(io.BytesIO(encoded(image))).size == (32, 32)
