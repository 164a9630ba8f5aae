"""tarfile for archives of unknown origin: what is damaged is noticed, what is hostile is refused,
neither hangs.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from lidit.sources.base import packed_as

_MAX_HEADER_BYTES = 1 << 20
# Extended headers in front of one member; each is a call inside the last one's.
_MAX_EXTENDED = 32
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# tar's largest usual record (tar -b 2048): archives are padded with zeros to whole records.
_MAX_RECORD = 1 << 20
_READS_PAST_END = 100


class _Header(tarfile.TarInfo):
    """Remembers why reading stopped: tarfile takes a damaged header in the middle for the end of
    the archive.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        archive = cast(Archive, archive)
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.stop = None
            raise
        except tarfile.TarError as error:
            archive.stop = str(error) or type(error).__name__
            raise
        except (ValueError, IndexError) as error:  # of the numbers in extended and sparse headers
            archive.stop = f"invalid header: {error}"
            raise tarfile.ReadError(archive.stop) from None

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        archive = cast(Archive, archive)
        archive.extended = archive.extended + 1 if self.type in _EXTENDED else 0
        if archive.extended and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"extended header of {self.size} bytes")
        if archive.extended > _MAX_EXTENDED:
            raise tarfile.ReadError(f"more than {_MAX_EXTENDED} extended headers of one member")
        return super()._proc_member(archive)  # type: ignore[misc]


class Archive(tarfile.TarFile):
    """A tar read as a stream. stop: why it ended before its end, None where a block of zeros ended
    it.
    """

    tarinfo = _Header
    stop: str | None = None
    extended = 0
    members: list[tarfile.TarInfo]

    def each(self) -> Iterator[tarfile.TarInfo]:
        """The members in order. tarfile keeps every header, with which memory would grow; here they
        are dropped.
        """
        for member in self:
            self.members = []
            yield member

    def beyond_end(self) -> str | None:
        """What stands behind the archive's end and is no padding, in words; to be asked after the
        last member.

        tarfile takes one block of zeros for the end, but a stretch that was lost on a disk reads as
        zeros too, and a second archive may follow. Reads only until it knows: a compressed archive
        can hold zeros for ever.
        """
        stream = cast(Any, self.fileobj)
        end = stream.tell() - tarfile.BLOCKSIZE
        while content := stream.read(1 << 16):
            if content.strip(b"\0"):
                return f"data behind the zeros from byte {end} on"
            if stream.tell() - end > _MAX_RECORD + 2 * tarfile.BLOCKSIZE:
                return f"zeros from byte {end} on, more than padding"
        size = stream.tell()
        # Other records than tar's own of 10 KiB are powers of two, and the whole archive is a
        # number of them.
        record = max(tarfile.RECORDSIZE, min(size & -size, _MAX_RECORD))
        zeros = size - end
        if zeros <= record + 2 * tarfile.BLOCKSIZE:
            return None
        return f"{zeros} zeros from byte {end} on, more than padding"


def open_archive(stream: io.BufferedReader) -> Archive:
    """The archive in `stream`. Whatever is wrong with it raises tarfile.TarError, here and while it
    is read.
    """
    gzipped = packed_as(stream) == "gzip"  # by its bytes: names are often wrong about that
    return Archive.open(fileobj=cast(BinaryIO, _Content(stream, gzipped)), mode="r|")


class _Content:
    """The archive's bytes. gzip here and not in tarfile, which reads the first member of a gzip
    file alone.
    """

    def __init__(self, stream: BinaryIO, compressed: bool) -> None:
        self.file = gzip.GzipFile(fileobj=stream, mode="rb") if compressed else stream
        self.reads_past_end = 0

    def read(self, size: int) -> bytes:
        try:
            content = self.file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise tarfile.ReadError(str(error)) from None
        self.reads_past_end += not content
        # tarfile would seek on to the end of a member of 2^80 bytes
        if self.reads_past_end > _READS_PAST_END:
            raise tarfile.ReadError("unexpected end of data")
        return content
