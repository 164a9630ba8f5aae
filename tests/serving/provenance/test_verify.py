"""Was this picture made here? The marks are asked, each says what it can, and none says more."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

pytest.importorskip("c2pa")

from lidit.errors import InputError
from lidit.serving.provenance.certificates import make_certificates
from lidit.serving.provenance.issued import Issued, IssuedLog, perceptual_hash
from lidit.serving.provenance.manifest import ManifestSigner, ProvenanceUnavailable
from lidit.serving.provenance.verify import PictureFinding, verify_picture
from lidit.serving.provenance.watermark import Watermark
from tests.helpers.marked_pictures import Image, compressed, cropped, encoded, even, photo, scene

PAYLOAD = 7_000_000
NOON = 1_800_000_000.0


@dataclass
class Studio:
    """A place where pictures are made: marked, signed, noted."""

    log: IssuedLog
    mark: Watermark
    signer: ManifestSigner
    roots: str
    picture: bytes
    image: Image
    issued: Issued

    def ask(self, picture: bytes) -> PictureFinding:
        return verify_picture(picture, self.log, self.mark, self.roots)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = tmp_path_factory.mktemp("studio")
    chain, key, root = make_certificates(folder, "Studio")
    signer, mark = ManifestSigner.from_files(chain, key), Watermark(b"secret")
    log = IssuedLog(folder / "issued.sqlite", create=True, clock=lambda: NOON)
    for seed in range(20):
        log.add(encoded(scene(256, seed)), scene(256, seed), "another request")
    image = mark.embed(photo(256), PAYLOAD)
    picture, _ = signer.sign(encoded(image), "image/png", "request-1", "0" * 64)
    issued = log.add(picture, image, "request-1", PAYLOAD)
    return Studio(log, mark, signer, root.read_text(), picture, image, issued)


def test_the_file_as_it_was_delivered(studio: Studio) -> None:
    found = studio.ask(studio.picture)
    assert found.answer == "made here"
    assert found.manifest.state == "trusted"
    assert found.watermark == PAYLOAD
    assert found.issued is not None
    assert (found.issued.match, found.issued.picture) == ("exact", studio.issued)
    assert studio.issued.request == "request-1"
    assert studio.issued.issued == NOON


# What somebody did to the picture -> what still tells of it.
CHANGES: dict[str, tuple[Callable[[Image], bytes], str]] = {
    "stripped": (encoded, "mark"),
    "compressed": (lambda image: encoded(image, "JPEG"), "mark"),
    "cropped": (lambda image: encoded(cropped(image)), "mark"),
    "cropped and compressed": (lambda image: encoded(cropped(image), "JPEG"), "mark"),
    "scaled": (
        lambda image: encoded(np.asarray(Pillow.fromarray(image).resize((200, 200)))),
        "near",
    ),
}


@pytest.mark.parametrize(("change", "match"), CHANGES.values(), ids=CHANGES)
def test_a_picture_that_was_changed_is_still_traced(
    studio: Studio, change: Callable[[Image], bytes], match: str
) -> None:
    found = studio.ask(change(studio.image))
    assert found.answer == "altered"
    assert found.manifest.state == "absent"
    assert found.issued is not None
    assert (found.issued.match, found.issued.picture) == (match, studio.issued)


def test_a_changed_byte_is_seen(studio: Studio) -> None:
    for place in range(-400, -40, 30):
        changed = bytearray(studio.picture)
        changed[place] ^= 1
        found = studio.ask(bytes(changed))
        assert (found.manifest.state, found.answer) == ("invalid", "altered")


def test_a_manifest_does_not_fit_another_picture(studio: Studio) -> None:
    found = studio.ask(transplant(studio.picture, encoded(scene(256, 99))))
    assert (found.manifest.state, found.answer) == ("invalid", "altered")
    assert found.watermark is None
    assert found.issued is None


def transplant(signed: bytes, other: bytes) -> bytes:
    """The PNG `other` with the manifest's chunk of `signed`."""
    start = signed.index(b"caBX") - 4
    length = int.from_bytes(signed[start : start + 4], "big") + 12
    return other[:33] + signed[start : start + length] + other[33:]


def test_what_others_made_is_unknown(studio: Studio, tmp_path: Path) -> None:
    for other in (scene(256, 50), np.rot90(photo(256)).copy(), even(256), even(32, 0)):
        found = studio.ask(encoded(other))
        assert found.answer == "unknown"
        assert (found.manifest.state, found.watermark, found.issued) == ("absent", None, None)
    # Signed by somebody else, whatever program they name.
    chain, key, _ = make_certificates(tmp_path, "Studio")
    forged, _ = ManifestSigner.from_files(chain, key).sign(
        encoded(scene(256, 50)), "image/png", "x", "0" * 64
    )
    found = studio.ask(forged)
    assert (found.manifest.state, found.answer) == ("untrusted", "unknown")


def test_what_is_not_given_is_not_asked(studio: Studio) -> None:
    found = verify_picture(studio.picture)
    assert (found.manifest.state, found.watermark, found.issued, found.answer) == (
        "untrusted",
        None,
        None,
        "unknown",
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(100), encoded(photo(64))[:500]],
)
def test_what_is_no_picture_is_the_users_mistake(studio: Studio, content: bytes) -> None:
    with pytest.raises(InputError, match="give the file as it was"):
        studio.ask(content)


def test_likeness_lasts_through_what_happens_to_pictures() -> None:
    image = photo(512)
    own = perceptual_hash(image)
    assert own is not None
    for copy in (
        compressed(image, 30),
        photo(128),
        np.clip(image * 0.8 + 20, 0, 255).astype(np.uint8),
    ):
        other = perceptual_hash(copy)
        assert other is not None
        assert (own ^ other).bit_count() <= 6
    hashes = [perceptual_hash(scene(64, seed)) for seed in range(30)]
    distances = [(a ^ b).bit_count() for n, a in enumerate(hashes) for b in hashes[:n] if a and b]
    assert min(distances) > 6
    assert perceptual_hash(even(64)) is None


def test_even_pictures_are_told_by_their_bytes_alone(studio: Studio) -> None:
    studio.log.add(encoded(even(64)), even(64), "request-3")
    found = studio.log.find(encoded(even(64)), even(64))
    assert found is not None
    assert found.match == "exact"
    assert studio.log.find(encoded(even(64, 250)), even(64, 250)) is None


def test_a_log_that_cannot_be_used_stops_delivery(tmp_path: Path) -> None:
    with pytest.raises(ProvenanceUnavailable):
        IssuedLog(tmp_path / "absent.sqlite")
    log = IssuedLog(tmp_path / "issued.sqlite", create=True)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    log.path.unlink()
    with pytest.raises(ProvenanceUnavailable):
        log.add(b"", photo(64), "request")
    assert not log.path.exists()
    log.path.write_bytes(b"no database" * 1000)
    with pytest.raises(ProvenanceUnavailable):
        log.find(b"", photo(64))
