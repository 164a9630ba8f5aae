"""The C2PA manifest: a signature over a file's final bytes that says which program made the
picture.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

from lidit.errors import InputError, one_line

Format = Literal["image/png", "image/jpeg", "image/webp"]
GENERATOR = "LI-DiT"
MADE_BY_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# Nothing is fetched, whatever a manifest asks for.
OFFLINE = {"remote_manifest_fetch": False, "ocsp_fetch": False}


class ProvenanceUnavailable(Exception):
    """A picture could not be marked as it must be: it is not delivered, the gateway answers 503."""


class ManifestSigner:
    """Signs pictures; load once, threads may share it. `lidit-pipeline[serve]` has the library for
    it.

    Args:
        certificates: PEM chain, the signer's first. sign: bytes -> ES256 signature, as 64 bytes (r,
            s).
    """

    def __init__(self, certificates: str, sign: Callable[[bytes], bytes]) -> None:
        self._library = _library()
        self._certificates, self._sign = certificates, sign
        self._lock = threading.Lock()

    @classmethod
    def from_files(cls, certificates: Path, key: Path) -> Self:
        """certificates: PEM chain, the signer's first. key: PEM of an ES256 private key. InputError
        where they fail.
        """
        chain = _text(certificates)
        try:
            loaded = import_module(
                "cryptography.hazmat.primitives.serialization"
            ).load_pem_private_key(_text(key).encode(), None)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{key}: is no private key in PEM without a password ({type(error).__name__})"
            ) from None
        curves = import_module("cryptography.hazmat.primitives.asymmetric.ec")
        if getattr(getattr(loaded, "curve", None), "name", "") != "secp256r1":
            raise InputError(f"{key}: is no key for ES256; make one on the curve P-256")
        try:
            certificate = import_module("cryptography.x509").load_pem_x509_certificates(
                chain.encode()
            )[0]
        except ValueError:
            raise InputError(f"{certificates}: holds no certificate in PEM") from None
        if certificate.public_key().public_numbers() != loaded.public_key().public_numbers():
            raise InputError(f"{key}: is not the key of the first certificate in {certificates}")
        method = curves.ECDSA(import_module("cryptography.hazmat.primitives.hashes").SHA256())
        return cls.from_callback(certificates, lambda data: loaded.sign(data, method))

    @classmethod
    def from_callback(cls, certificates: Path, sign: Callable[[bytes], bytes]) -> Self:
        """sign: bytes -> ES256 signature, by a key management service say."""
        return cls(_text(certificates), sign)

    def sign(self, picture: bytes, kind: Format, title: str, model: str) -> tuple[bytes, str]:
        """The signed file and the manifest's id. Nothing may change the bytes afterwards.

        title: shown by readers, such as the request id; never the prompt. model: the model's
        digest. Raises ProvenanceUnavailable.
        """
        c2pa = self._library
        action = {
            "action": "c2pa.created",
            "digitalSourceType": MADE_BY_MODEL,
            "softwareAgent": {"name": GENERATOR, "version": version("lidit-pipeline")},
            "parameters": {"model": model},
        }
        wanted = {
            "claim_generator_info": [{"name": GENERATOR, "version": version("lidit-pipeline")}],
            "title": title,
            "format": kind,
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        failures: list[str] = []

        def sign(data: bytes) -> bytes:
            try:
                return self._sign(data)
            except Exception as error:  # the library would log its text
                failures.append(type(error).__name__)
                return b""

        signed = io.BytesIO()
        try:
            context = c2pa.Context.from_dict(_settings(None))
            signer = c2pa.Signer.from_callback(sign, c2pa.C2paSigningAlg.ES256, self._certificates)
            with context, signer, c2pa.Builder(wanted, context) as builder:
                builder.sign(signer, kind, io.BytesIO(picture), signed)
            found = read_manifest(signed.getvalue(), kind)
        except c2pa.C2paError as error:
            reason = failures[0] if failures else one_line(error, 200)
            raise ProvenanceUnavailable(f"the picture cannot be signed ({reason})") from None
        # What was signed is read back: a chain that readers refuse must not be found by users.
        if found.state not in ("untrusted", "trusted") or found.manifest is None:
            raise ProvenanceUnavailable(
                f"the picture's signature is {found.state} ({found.reason})"
            )
        return signed.getvalue(), found.manifest


@dataclass(frozen=True)
class ManifestFinding:
    """state: "absent", "invalid" (bytes changed since), "untrusted" (whole, by a signer without a
    trusted root) or "trusted". manifest: its id. generator: the program it names. reason: of
    "invalid".
    """

    state: Literal["absent", "invalid", "untrusted", "trusted"]
    manifest: str | None = None
    generator: str | None = None
    reason: str | None = None


def read_manifest(picture: bytes, kind: Format, roots: str | None = None) -> ManifestFinding:
    """What the file's manifest says. roots: PEM of the certificates that are trusted."""
    c2pa = _library()
    try:
        with c2pa.Context.from_dict(_settings(roots)) as context:
            reader = c2pa.Reader.try_create(kind, io.BytesIO(picture), context=context)
            if reader is None:
                return ManifestFinding("absent")
            with reader:
                return _finding(json.loads(reader.json()), reader.get_validation_state())
    except c2pa.C2paError as error:
        return ManifestFinding("invalid", reason=one_line(error, 200))


def _finding(report: dict[str, Any], state: str | None) -> ManifestFinding:
    label = report.get("active_manifest")
    manifest = report.get("manifests", {}).get(label, {})
    generators = manifest.get("claim_generator_info") or [{}]
    statuses = [status.get("code", "") for status in report.get("validation_status", [])]
    faults = [code for code in statuses if code != "signingCredential.untrusted"]
    words = {"Valid": "untrusted", "Trusted": "trusted"}
    found: Any = words.get(state or "", "invalid")
    if found == "untrusted" and faults:
        found = "invalid"
    return ManifestFinding(found, label, generators[0].get("name"), faults[0] if faults else None)


def _settings(roots: str | None) -> dict[str, Any]:
    trust = {} if roots is None else {"trust": {"trust_anchors": roots}}
    # Without thumbnails: a quarter of the bytes, and no copy of the picture that nothing has
    # checked.
    return {
        "verify": {**OFFLINE, "verify_trust": True},
        "builder": {"thumbnail": {"enabled": False}},
        **trust,
    }


def _library() -> Any:
    try:
        return import_module("c2pa")
    except ImportError:
        raise InputError(
            "manifests need c2pa-python; install lidit-pipeline with its extra: [serve]"
        ) from None


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: cannot be read as PEM; give a readable file") from None
