"""What every source gives: samples as found, one at a time, and refusals in words."""

from __future__ import annotations

import hashlib
import io
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from lidit.errors import one_line
from lidit.store import ImageReference
from lidit.store.files.folder import is_url, open_url
from lidit.store.files.remote import plain_refusals
from lidit.store.samples import printable

# Text members and rows larger than this are refused unread: no caption or metadata record needs
# more.
MAX_TEXT_BYTES = 16 * 1024 * 1024
MAX_IMAGE_BYTES = 512 * 1024 * 1024
ORIGINAL = "original"
KEY_FIELDS = ("key", "__key__", "id", "image_id")
# Kinds of ignored members told apart; a tar of a.x0001, b.x0002 must not make a list as long as
# itself.
IGNORED_KINDS = 20
OTHER_KINDS = "others"
SECOND_DOT = "behind a second dot in its name"
_SHOWN_CHARS = 100
# Characters that a terminal obeys, or that turn what follows them.
_CONTROL = ("Cc", "Cf")
# What systems put beside people's files, in lower case; names that begin with a dot are the others.
_SYSTEM_NAMES = (
    "__macosx",
    "@eadir",
    "#recycle",
    "@recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
)
# First bytes of files that are no text, whatever their name says.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
}


class BadRecordError(Exception):
    """A row or member that cannot be used; the message is the reason, for a quarantine row."""


@dataclass(frozen=True)
class SourceFile:
    """One file (or folder of images) to read.

    path: local path or URL; name: the same relative to the corpus's root; kind: which reader takes
    it; problem: why it must not be opened, which is then its one refusal.
    """

    kind: str
    path: str
    name: str
    bytes: int
    modified: str
    problem: str | None = None


@dataclass(frozen=True)
class FieldNames:
    """Which fields hold captions (field -> origin) and images, and whether images are wanted at
    all.
    """

    captions: dict[str, str]
    images: tuple[str, ...]
    captions_only: bool


@dataclass(frozen=True)
class RawSample:
    """A sample before any check.

    captions: (text, origin); image: its bytes, or None where the source has no images; found: the
    members it was made of, for a refusal that says what was there.
    """

    key: str
    captions: tuple[tuple[str, str], ...]
    image: bytes | None = None
    reference: ImageReference | None = None
    label: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    found: tuple[str, ...] = ()


class OpenedSource:
    """A source file being read and hashed on the way, so that a remote file is fetched once.

    ignored: kind -> how many members were no part of a sample; columns: name -> type of a table's
    columns or rows' fields; named: files of images that rows name.
    """

    def __init__(self, source: SourceFile) -> None:
        self.source = source
        self._hash = hashlib.sha256()
        self._stream: io.BufferedReader | None = None
        self.ignored: dict[str, int] = {}
        self.columns: dict[str, str] = {}
        self.named: set[str] = set()

    def stream(self) -> io.BufferedReader:
        """The bytes from the start, to be read in order."""
        self._stream = io.BufferedReader(
            _HashingReader(open_binary(self.source.path), self._hash), 1 << 20
        )
        return self._stream

    def hash(self, content: bytes) -> None:
        """For readers that do not use `stream`: what they read, in a fixed order."""
        self._hash.update(content)

    def ignore(self, kind: str) -> None:
        """Count a member that is no part of a sample, such as a .npy beside an image."""
        if kind not in self.ignored and len(self.ignored) >= IGNORED_KINDS:
            kind = OTHER_KINDS
        self.ignored[kind] = self.ignored.get(kind, 0) + 1

    def finish(self) -> None:
        """Read what is left, so that the hash is that of the whole file."""
        while self._stream is not None and self._stream.read(1 << 20):
            pass

    @property
    def sha256_read(self) -> str:
        """Of everything read so far."""
        return self._hash.hexdigest()

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class _HashingReader(io.RawIOBase):
    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self.file, self.digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.file.read(len(buffer))
        buffer[: len(content)] = content
        self.digest.update(content)
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def open_binary(path: str) -> BinaryIO:
    """A local file or an object behind a URL, for reading."""
    if is_url(path):
        with plain_refusals(path):
            file_system, name = open_url(path)
            opened: BinaryIO = file_system.open(name, "rb")
        return opened
    return open(path, "rb")  # noqa: PTH123


def shown(name: str) -> str:
    """A name as a reason shows it: any bytes, none that a terminal obeys, and not the whole of an
    image that stands where its path should."""
    text = printable(name if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]}...")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _CONTROL else c
        for c in text
    )


def suffix_kind(name: str) -> str:
    """A file's kind by its last suffix, as a count of what was left out names it."""
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return shown(f".{suffix.lower()}") if dot and stem else "no suffix"


def hidden_kind(name: str) -> str | None:
    """What to call a file or folder that no person put there, by its own name; None for every
    other."""
    if name.startswith("._"):
        return "hidden ._*"
    if name.startswith(".") and name not in (".", ".."):
        return f"hidden {shown(name)}"
    return f"system {shown(name)}" if name.lower() in _SYSTEM_NAMES else None


def packed_as(stream: io.BufferedReader) -> str | None:
    """The format of a compressed or binary file by its first bytes, which stay unread; None for all
    others."""
    start = stream.peek(8)[:8]
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


class _Constant(str):
    """NaN or Infinity of a JSON text: kept readable in metadata, never a caption."""


def parse_json(content: bytes) -> Any:
    """One JSON value, after a byte order mark or not. Raises BadRecordError with the reason."""
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=_Constant)
    except UnicodeDecodeError as error:
        raise BadRecordError(f"invalid UTF-8: byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"invalid JSON: {one_line(error)}") from None


def captions_in(record: dict[str, Any], fields: dict[str, str]) -> list[tuple[str, str]]:
    """Captions of a JSON record or table row, as (text, origin).

    Taken from the configured fields and from `captions`: a text, UTF-8 bytes, or a list of texts,
    of bytes or of {"text": ..., "origin": ...}.
    """
    found = [
        entry for name, origin in fields.items() for entry in _captions(record.get(name), origin)
    ]
    return found if "captions" in fields else found + _captions(record.get("captions"), ORIGINAL)


def _captions(value: Any, origin: str) -> list[tuple[str, str]]:
    found = []
    for entry in value if isinstance(value, list) else [value]:
        named = isinstance(entry, dict)
        text = text_of(entry.get("text", entry.get("caption")) if named else entry)
        if text is not None:
            found.append((text, str((entry.get("origin") if named else None) or origin)))
    return found


def text_of(value: Any) -> str | None:
    """A text, or bytes as the text they hold (other bytes than UTF-8 as surrogates, for the caption
    check)."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) and not isinstance(value, _Constant) else None


def key_in(record: dict[str, Any], otherwise: str) -> str:
    """The record's own key, or `otherwise`."""
    for name in KEY_FIELDS:
        if isinstance(record.get(name), str | int):
            return str(record[name])
    return otherwise


def label_in(record: dict[str, Any]) -> str | None:
    """A class label, for class template captions."""
    for name in ("class", "label", "class_name", "cls"):
        if isinstance(record.get(name), str | int):
            return str(record[name])
    return None


def lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines from 1, without their end; None for a line longer than MAX_TEXT_BYTES."""
    number = 0
    while line := stream.readline(MAX_TEXT_BYTES + 1):
        number += 1
        if len(line) > MAX_TEXT_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_TEXT_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line.rstrip(b"\r\n")
