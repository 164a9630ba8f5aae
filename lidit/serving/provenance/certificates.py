"""Certificates of one's own for signing: a first start and tests need no authority. Readers
elsewhere call the signer "untrusted"; for them a certificate of the C2PA trust list takes their
place.
"""

from __future__ import annotations

import datetime
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from lidit.errors import InputError

YEARS = 10
CHAIN, KEY, ROOT = "chain.pem", "key.pem", "root.pem"


def make_certificates(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """A root and a signer under it, ES256: FOLDER/chain.pem (signer, root), key.pem, root.pem.

    name: the organisation that readers show. The root's key is thrown away: it signs nothing else.
    Existing files are kept as they are. Raises InputError where only some of them are there.
    """
    paths = folder / CHAIN, folder / KEY, folder / ROOT
    present = [path for path in paths if path.exists()]
    if len(present) == len(paths):
        return paths
    if present:
        missing = next(path for path in paths if not path.exists())
        raise InputError(
            f"{missing}: is missing beside {present[0].name}; put it back, or move the others away"
        )
    root_key, signer_key = _new_key(), _new_key()
    root = _certificate(name, root_key, None)
    signer = _certificate(name, signer_key, (root, root_key))
    pem = [certificate.public_bytes(_crypto("hazmat.primitives.serialization").Encoding.PEM)
           for certificate in (signer, root)]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    # The key first and the chain last: a start that breaks off leaves a set that is seen to be
    # incomplete.
    _write(folder / KEY, _key_pem(signer_key), 0o600)
    _write(folder / ROOT, pem[1], 0o644)
    _write(folder / CHAIN, b"".join(pem), 0o644)
    return paths


def _certificate(name: str, key: Any, issuer: tuple[Any, Any] | None) -> Any:
    """A root without an issuer, else a signer: C2PA asks for digital signatures and a purpose, here
    e-mail.
    """
    x509 = import_module("cryptography.x509")
    oid = import_module("cryptography.x509.oid")
    role = "signer" if issuer else "root"
    subject = x509.Name(
        [
            x509.NameAttribute(oid.NameOID.ORGANIZATION_NAME, name),
            x509.NameAttribute(oid.NameOID.COMMON_NAME, f"{name} {role}"),
        ]
    )
    by, by_key = (issuer[0].subject, issuer[1]) if issuer else (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    uses = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only",
         "decipher_only"), False
    )  # fmt: skip
    usage = x509.KeyUsage(
        digital_signature=issuer is not None, key_cert_sign=not issuer, crl_sign=not issuer, **uses
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(by_key.public_key()), critical=False
        )
    )
    if issuer:
        purpose = x509.ExtendedKeyUsage([oid.ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=True)
    return builder.sign(by_key, _crypto("hazmat.primitives.hashes").SHA256())


def _new_key() -> Any:
    curves = _crypto("hazmat.primitives.asymmetric.ec")
    return curves.generate_private_key(curves.SECP256R1())


def _key_pem(key: Any) -> bytes:
    forms = _crypto("hazmat.primitives.serialization")
    pem: bytes = key.private_bytes(
        forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption()
    )
    return pem


def _crypto(module: str) -> Any:
    try:
        return import_module(f"cryptography.{module}")
    except ImportError:
        raise InputError(
            "certificates need cryptography; install lidit-pipeline with its extra: [serve]"
        ) from None


def _write(path: Path, content: bytes, mode: int) -> None:
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    with os.fdopen(file, "wb") as opened:
        opened.write(content)
