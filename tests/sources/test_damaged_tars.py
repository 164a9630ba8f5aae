"""What a damaged, doubled or hostile tar loses is said in a refusal; none of them hangs or brings a
reader down.
"""

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lidit.sources import tar_archive
from tests.helpers.pictures import Member, encoded, picture, sample, write_tar
from tests.helpers.source_reading import read


def members(first: int, count: int) -> list[Member]:
    return [
        m
        for i in range(first, first + count)
        for m in sample(f"s{i:03d}", f"caption {i}", seed=i % 7)
    ]


def zeroed_stretch(path: Path) -> bytes:
    content = bytearray(write_tar(path, members(0, 50)).read_bytes())
    start = len(content) // 2 // 512 * 512
    content[start : start + 4096] = bytes(4096)
    return bytes(content)


def zeroed_half(path: Path) -> bytes:
    content = write_tar(path, members(0, 50)).read_bytes()
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def two_archives(path: Path) -> bytes:
    return (
        write_tar(path, members(0, 20)).read_bytes() + write_tar(path, members(20, 30)).read_bytes()
    )


@pytest.mark.parametrize("damaged", [zeroed_stretch, zeroed_half, two_archives])
@pytest.mark.parametrize("gzip_members", [0, 1, 2])
def test_zeros_are_the_end_only_where_nothing_but_padding_follows(
    tmp_path: Path, damaged: Callable[[Path], bytes], gzip_members: int
) -> None:
    content = damaged(tmp_path / "made")
    path = tmp_path / ("x.tar.gz" if gzip_members else "x.tar")
    if gzip_members == 2:
        end = len(write_tar(tmp_path / "made", members(0, 20)).read_bytes())
        content = gzip.compress(content[:end]) + gzip.compress(content[end:])
    path.write_bytes(gzip.compress(content) if gzip_members == 1 else content)
    samples, refused = read(path)
    assert 19 < len(samples) < 30
    assert [r.what for r in refused][-1] == "file"
    assert "archive cut off: after member s0" in refused[-1].reason
    assert "what may have followed is lost" in refused[-1].reason


@pytest.mark.parametrize("blocking", [0, 10 << 10, 64 << 10, 1 << 20])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_padding_of_any_usual_record_is_no_loss(tmp_path: Path, blocking: int, suffix: str) -> None:
    content = write_tar(tmp_path / "made", members(0, 3)).read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512 + 1024)
    content += bytes(-len(content) % blocking) if blocking else b""
    (tmp_path / f"x{suffix}").write_bytes(
        gzip.compress(content) if suffix == ".tar.gz" else content
    )
    samples, refused = read(tmp_path / f"x{suffix}")
    assert len(samples) == 3
    assert not refused


def test_one_archive_in_several_gzip_members_is_read_whole(tmp_path: Path) -> None:
    content = write_tar(tmp_path / "made", members(0, 20)).read_bytes()
    parts = [content[start : start + 9000] for start in range(0, len(content), 9000)]
    (tmp_path / "x.tar.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    samples, refused = read(tmp_path / "x.tar.gz")
    assert len(samples) == 20
    assert not refused


def test_zeros_without_end_are_not_read_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_tar(tmp_path / "made", members(0, 2)).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(whole + bytes(64 << 20), 1))
    seen = 0
    read_all = tar_archive._Content.read

    def counted(self: object, size: int) -> bytes:
        nonlocal seen
        content = read_all(self, size)
        seen += len(content)
        return content

    monkeypatch.setattr(tar_archive._Content, "read", counted)
    samples, refused = read(tmp_path / "x.tar.gz")
    assert len(samples) == 2
    assert "more than padding" in refused[-1].reason
    assert seen < 2 << 20


def pax(headers: dict[str, str]) -> bytes:
    """A member with these extended headers, as the last one of an archive."""
    info = tarfile.TarInfo("z.png")
    info.size, info.pax_headers = 600, headers
    return info.tobuf(tarfile.PAX_FORMAT) + b"\x89PNG" * 150 + bytes(424)


def long_names(count: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 4
    return (info.tobuf(tarfile.GNU_FORMAT) + b"abc\0" + bytes(508)) * count


def huge_member() -> bytes:
    info = tarfile.TarInfo("z.png")
    info.size = 1 << 80
    return info.tobuf(tarfile.GNU_FORMAT) + b"x" * 512


def sparse_without_end() -> bytes:
    info = tarfile.TarInfo("z.png")
    info.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[482] = 1  # more sparse headers follow
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "hostile",
    [
        pax({"GNU.sparse.map": "abc"}),
        pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
        pax({"GNU.sparse.realsize": "x"}),
        pax({"size": str(10**30)}),
        long_names(2000),
        huge_member(),
        sparse_without_end(),
    ],
    ids=[
        "sparse map",
        "sparse 1.0",
        "real size",
        "pax size",
        "long names",
        "huge member",
        "sparse headers",
    ],
)
def test_hostile_headers_are_one_refusal(tmp_path: Path, hostile: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", sample("a"))
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content + bytes(-len(content) % 512) + hostile)
    samples, refused = read(path)
    assert [s.key for s in samples] == ["a"]
    assert refused[-1].what == "file"
    assert "archive cut off" in refused[-1].reason


def test_names_in_capitals_are_read_as_what_they_are(tmp_path: Path) -> None:
    write_tar(tmp_path / "X.TAR.GZ", sample("a"), "w:gz")
    samples, refused = read(tmp_path / "X.TAR.GZ")
    assert [s.image for s in samples] == [encoded(picture())]
    assert not refused
