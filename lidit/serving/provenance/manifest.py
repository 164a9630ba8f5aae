"""The C2PA manifest: a signature over a file's final bytes that says which program made the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Format = Literal["image/png", "image/jpeg", "image/webp"]


class ProvenanceUnavailable(Exception):
    """A picture could not be marked as it must be: it is not delivered, the gateway answers 503."""


class ManifestSigner:
    """Signs pictures; load once, threads may share it. `lidit-pipeline[serve]` has the library for it."""

    @classmethod
    def from_files(cls, certificates: Path, key: Path) -> ManifestSigner:
        """certificates: PEM chain, the signer's first. key: PEM of an ES256 private key. InputError where they fail."""
        raise NotImplementedError

    @classmethod
    def from_callback(cls, certificates: Path, sign: Callable[[bytes], bytes]) -> ManifestSigner:
        """sign: bytes -> ES256 signature, by a key management service say."""
        raise NotImplementedError

    def sign(self, picture: bytes, kind: Format, title: str, model: str) -> tuple[bytes, str]:
        """The signed file and the manifest's id. Nothing may change the bytes afterwards.

        title: shown by readers, such as the request id; never the prompt. model: the model's digest.
        Raises ProvenanceUnavailable.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ManifestFinding:
    """state: "absent", "invalid" (bytes changed since), "untrusted" (whole, by a signer without a trusted root) or
    "trusted". manifest: its id. generator: the program it names. reason: of "invalid"."""

    state: Literal["absent", "invalid", "untrusted", "trusted"]
    manifest: str | None = None
    generator: str | None = None
    reason: str | None = None


def read_manifest(picture: bytes, kind: Format, roots: str | None = None) -> ManifestFinding:
    """What the file's manifest says. roots: PEM of the certificates that are trusted."""
    raise NotImplementedError


def make_certificates(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """A root of one's own and a signer under it, for a first start and for tests: chain.pem, key.pem, root.pem.

    Readers elsewhere say "untrusted": for them a certificate of the C2PA trust list is needed.
    """
    raise NotImplementedError
