"""An invisible watermark of 32 bits in the brightness of a picture.

A tile of 64 x 64 values is repeated over the picture: the sum of a pattern that is always there and
of one pattern per bit, added or subtracted. The patterns are noise of middle frequencies, which the
eye hardly sees and JPEG keeps; where the picture is rough the tile is added more strongly. A reader
averages the picture's tiles, finds by correlation with the first pattern how far the tiling is
shifted, as by cropping, and reads the bits there.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from scipy import fft, ndimage

Image = NDArray[np.uint8]
Plane = NDArray[np.float64]

LEAST_SIDE = 256
BITS = 32
CHECK_BITS = 24  # of the payload's hash, by which a mark is told from noise
PLACES = 8  # shifts of the tiling that are tried, most likely first
WEAKEST = 6  # bits, the least sure ones, that may have been read wrongly
FLIPS = sorted(
    (np.array(flips, np.uint8) for flips in itertools.product((0, 1), repeat=WEAKEST)), key=np.sum
)
FIRST = 3.0  # amplitude of the first pattern; of the others 1
TILE = 64
BAND = (0.08, 0.25)  # cycles per pixel; a block of JPEG has frequencies up to 0.5
# Grey levels, root mean square over an even picture; the first that lasts is used.
STRENGTHS = (1.4, 2.0, 3.0, 4.0)
ROUGH = 12.0  # deviation of the neighbourhood, in grey levels, at which the mark is twice as strong
MOST = 2.0
BRIGHTNESS = np.array([0.299, 0.587, 0.114])


class NoRoom(Exception):
    """The picture is too small, or too uniform at its extremes, to carry a watermark that can be
    read back.
    """


class Watermark:
    """secret: whoever has it can read the mark, forge it and take it out; the same for a whole
    deployment.
    """

    def __init__(self, secret: bytes) -> None:
        # [1 + BITS + CHECK_BITS, TILE, TILE], each of mean square 1
        self._patterns = _patterns(secret)
        self._spectra = fft.rfft2(self._patterns)
        self._secret = secret

    def embed(self, image: Image, payload: int) -> Image:
        """The image [height, width, 3] with a payload in [0, 2**32), read back before it is
        returned. Raises NoRoom below 256 pixels and where the mark cannot be read back.
        """
        if not 0 <= payload < 1 << BITS:
            raise ValueError(f"a payload has {BITS} bits")
        height, width = image.shape[:2]
        if min(height, width) < LEAST_SIDE:
            raise NoRoom(
                f"{height} x {width} pixels: a watermark needs {LEAST_SIDE} x {LEAST_SIDE}"
            )
        amplitudes = np.array([FIRST, *(1 - 2.0 * self._bits(payload))])
        tile = np.tensordot(amplitudes / np.linalg.norm(amplitudes), self._patterns, 1)
        rows, columns = -(-height // TILE), -(-width // TILE)
        added = np.tile(tile, (rows, columns))[:height, :width] * _visibility(image)
        for strength in STRENGTHS:
            marked = np.clip(np.rint(image + strength * added[..., None]), 0, 255).astype(np.uint8)
            if all(self.read(worn) == payload for worn in _worn(marked)):
                return marked
        # A picture that wears badly is marked as strongly as is allowed.
        if self.read(marked) != payload:
            raise NoRoom("the watermark cannot be read back from this picture")
        return marked

    def read(self, image: Image) -> int | None:
        """The payload, or None where no mark is found. Cropping is no hindrance, scaling and
        rotating are.
        """
        if min(image.shape[:2]) < TILE:
            return None
        for soft in self.soft_bits(image):
            weakest = np.abs(soft).argsort()[:WEAKEST]
            for flips in FLIPS:
                bits = (soft < 0).astype(np.uint8)
                bits[weakest] ^= flips
                payload = int.from_bytes(np.packbits(bits[:BITS]).tobytes(), "big")
                if np.array_equal(bits, self._bits(payload)):
                    return payload
        return None

    def soft_bits(self, image: Image) -> Plane:
        """The bits [PLACES, BITS + CHECK_BITS] at the likeliest shifts of the tiling, likeliest
        first: above 0 for a 0, below for a 1, the farther the surer.
        """
        spectrum = fft.rfft2(_folded(_residue(image)))
        # no frequency of the picture drowns the others
        spectrum /= np.sqrt(np.abs(spectrum)) + 1e-9
        match = fft.irfft2(spectrum * self._spectra.conj(), s=(TILE, TILE)).reshape(
            len(self._patterns), -1
        )
        places = match[0].argsort()[::-1][:PLACES]
        bits: Plane = match[1:, places].T
        return bits

    def _bits(self, payload: int) -> NDArray[np.uint8]:
        """The payload's bits, and those that tell it from noise."""
        written = payload.to_bytes(BITS // 8, "big")
        check = hashlib.blake2b(
            written, digest_size=CHECK_BITS // 8, key=self._secret[:64]
        ).digest()
        return np.unpackbits(np.frombuffer(written + check, np.uint8))


def _patterns(secret: bytes) -> Plane:
    """Noise of the band, one pattern per bit and one before them, drawn from the secret."""
    seed = int.from_bytes(hashlib.sha256(b"lidit watermark" + secret).digest(), "big")
    noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(
        (1 + BITS + CHECK_BITS, TILE, TILE)
    )
    frequency = np.hypot(fft.fftfreq(TILE)[:, None], fft.rfftfreq(TILE))
    within = (BAND[0] <= frequency) & (frequency <= BAND[1])
    patterns = fft.irfft2(fft.rfft2(noise) * within, s=(TILE, TILE))
    # Orthogonal, so that no bit disturbs another where the picture is even.
    flat, _ = np.linalg.qr(patterns.reshape(len(patterns), -1).T)
    return flat.T.reshape(patterns.shape) * TILE


def _worn(image: Image) -> Iterator[Image]:
    """What a mark has to last through: JPEG, and JPEG after crops at two places."""
    height, width = image.shape[:2]
    for top, left in ((0, 0), (height // 10, width // 10), (height // 20 | 1, width // 20 | 1)):
        compressed = io.BytesIO()
        kept = image[top : height - top // 2, left : width - left // 2]
        Pillow.fromarray(kept).save(compressed, "JPEG", quality=75)
        yield np.asarray(Pillow.open(compressed).convert("RGB"))


def _grey(image: Image) -> Plane:
    grey: Plane = image @ BRIGHTNESS
    return grey


def _visibility(image: Image) -> Plane:
    """How much of the mark each place takes: more where the picture is rough, so nothing is seen of
    it.
    """
    grey = _grey(image)
    mean = ndimage.uniform_filter(grey, 9)
    deviation = np.sqrt(np.maximum(ndimage.uniform_filter(grey**2, 9) - mean**2, 0))
    return np.minimum(1 + deviation / ROUGH, MOST)


def _residue(image: Image) -> Plane:
    """The picture without what is coarse in it; what is rough counts less, as it hides more than it
    adds.
    """
    grey = _grey(image)
    fine = grey - ndimage.gaussian_filter(grey, 3)
    spread = np.sqrt(ndimage.gaussian_filter(fine**2, 4)) + 2
    residue: Plane = np.clip(fine / spread, -2, 2)
    return residue


def _folded(plane: Plane) -> Plane:
    """The mean of all tiles [TILE, TILE], those that are cut off by the border included."""
    height, width = plane.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    padding = ((0, rows * TILE - height), (0, columns * TILE - width))
    values = np.pad(plane, padding).reshape(rows, TILE, columns, TILE).sum((0, 2))
    counts = np.pad(np.ones_like(plane), padding).reshape(rows, TILE, columns, TILE).sum((0, 2))
    mean: Plane = values / np.maximum(counts, 1)
    return mean
