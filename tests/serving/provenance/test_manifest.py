"""A signed picture says who made it, to any reader; one changed byte, and it says so."""

from __future__ import annotations

import re
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("c2pa")

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lidit.errors import InputError
from lidit.serving.provenance.certificates import make_certificates
from lidit.serving.provenance.manifest import (
    Format,
    ManifestSigner,
    ProvenanceUnavailable,
    read_manifest,
)
from tests.helpers.marked_pictures import encoded, photo

KINDS: list[tuple[str, Format]] = [
    ("PNG", "image/png"),
    ("JPEG", "image/jpeg"),
    ("WEBP", "image/webp"),
]
MODEL = "0" * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certificates")
    make_certificates(made, "Pictures & Co")
    return made


@pytest.fixture(scope="module")
def signer(folder: Path) -> ManifestSigner:
    return ManifestSigner.from_files(folder / "chain.pem", folder / "key.pem")


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_signed_picture_is_whole_and_trusted_by_its_root(
    name: str, kind: Format, signer: ManifestSigner, folder: Path
) -> None:
    picture = encoded(photo(64), name)
    signed, manifest = signer.sign(picture, kind, "request-1", MODEL)
    assert len(picture) < len(signed) < len(picture) + 20_000
    found = read_manifest(signed, kind)
    assert (found.state, found.manifest, found.generator) == ("untrusted", manifest, "LI-DiT")
    assert re.fullmatch(r"urn:c2pa:[0-9a-f-]{36}", manifest)
    assert read_manifest(signed, kind, (folder / "root.pem").read_text()).state == "trusted"
    assert read_manifest(picture, kind).state == "absent"
    assert b"trainedAlgorithmicMedia" in signed
    assert b"request-1" in signed


def test_another_root_trusts_nothing(signer: ManifestSigner, tmp_path: Path) -> None:
    make_certificates(tmp_path, "Pictures & Co")
    signed, _ = signer.sign(encoded(photo(64)), "image/png", "request-1", MODEL)
    assert (
        read_manifest(signed, "image/png", (tmp_path / "root.pem").read_text()).state == "untrusted"
    )


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_changed_byte_of_the_pixels_is_seen(
    name: str, kind: Format, signer: ManifestSigner
) -> None:
    signed, _ = signer.sign(encoded(photo(64), name), kind, "request-1", MODEL)
    # A WebP file begins with its pixels and ends with the manifest; the others are the other way
    # around.
    places = range(60, 300, 30) if name == "WEBP" else range(-300, -30, 30)
    for place in places:
        changed = bytearray(signed)
        changed[place] ^= 1
        found = read_manifest(bytes(changed), kind)
        assert found.state == "invalid", place
        assert found.reason


def test_a_key_service_signs_in_place_of_a_file(folder: Path) -> None:
    key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    asked = []

    def service(data: bytes) -> bytes:
        asked.append(data)
        return key.sign(data, ec.ECDSA(hashes.SHA256()))

    remote = ManifestSigner.from_callback(folder / "chain.pem", service)
    signed, _ = remote.sign(encoded(photo(64)), "image/png", "request-1", MODEL)
    assert len(asked) == 1
    assert read_manifest(signed, "image/png", (folder / "root.pem").read_text()).state == "trusted"


def fails(data: bytes) -> bytes:
    raise ConnectionError("the password of the service")


@pytest.mark.parametrize("service", [fails, lambda data: b"", lambda data: b"x" * 64])
def test_a_picture_that_is_not_signed_is_no_picture(service: object, folder: Path) -> None:
    remote = ManifestSigner.from_callback(folder / "chain.pem", service)  # type: ignore[arg-type]
    with pytest.raises(ProvenanceUnavailable) as failure:
        remote.sign(encoded(photo(64)), "image/png", "request-1", MODEL)
    assert "password" not in str(failure.value)


def test_bytes_that_are_no_picture_are_not_signed(signer: ManifestSigner) -> None:
    for content in (b"", b"no picture", encoded(photo(64))[:100]):
        with pytest.raises(ProvenanceUnavailable):
            signer.sign(content, "image/png", "request-1", MODEL)


def test_threads_share_a_signer(signer: ManifestSigner) -> None:
    picture = encoded(photo(64))
    with ThreadPoolExecutor(4) as pool:
        signed = list(
            pool.map(lambda n: signer.sign(picture, "image/png", f"request-{n}", MODEL), range(8))
        )
    assert len({manifest for _, manifest in signed}) == 8
    assert all(
        read_manifest(content, "image/png").manifest == manifest for content, manifest in signed
    )


def test_keys_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "other", "Others")
    chain, key = folder / "chain.pem", folder / "key.pem"
    curve = serialization.load_pem_private_key(key.read_bytes(), None)
    large = ec.generate_private_key(ec.SECP384R1())
    forms = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (tmp_path / "large.pem").write_bytes(large.private_bytes(*forms, serialization.NoEncryption()))
    (tmp_path / "locked.pem").write_bytes(
        curve.private_bytes(*forms, serialization.BestAvailableEncryption(b"password"))
    )
    for wrong, reason in (
        (other[1], "not the key of the first certificate"),
        (tmp_path / "large.pem", "no key for ES256"),
        (tmp_path / "locked.pem", "without a password"),
        (chain, "no private key"),
        (tmp_path / "absent.pem", "cannot be read"),
    ):
        with pytest.raises(InputError, match=reason):
            ManifestSigner.from_files(chain, wrong)
    with pytest.raises(InputError, match="cannot be read"):
        ManifestSigner.from_files(tmp_path / "absent.pem", key)
    with pytest.raises(InputError, match="no certificate"):
        ManifestSigner.from_files(key, key)


def test_certificates_are_made_once_and_the_key_is_the_owners(tmp_path: Path) -> None:
    paths = make_certificates(tmp_path / "new", "Pictures & Co")
    before = [path.read_bytes() for path in paths]
    assert make_certificates(tmp_path / "new", "Others") == paths
    assert [path.read_bytes() for path in paths] == before
    assert stat.S_IMODE(paths[1].stat().st_mode) == 0o600
    assert b"PRIVATE KEY" not in before[0] + before[2]
    paths[1].unlink()
    with pytest.raises(InputError, match=r"key\.pem: is missing beside"):
        make_certificates(tmp_path / "new", "Others")


def test_without_the_library_there_is_a_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(InputError, match=r"\[serve\]"):
        ManifestSigner.from_files(folder / "chain.pem", folder / "key.pem")
    with pytest.raises(InputError, match=r"\[serve\]"):
        read_manifest(b"", "image/png")
