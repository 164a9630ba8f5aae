"""Each kind of source gives every sample or a refusal that says why; hostile input is refused,
never fatal.
"""

import gzip
import io
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry

from lidit.errors import InputError
from lidit.sources import FieldNames, OpenedSource, RawSample, expand, read_source
from lidit.sources.base import open_binary
from tests.helpers.pictures import encoded, picture, sample, write_tar
from tests.helpers.source_reading import read

# -- WebDataset tars -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_tar_gives_images_captions_with_origins_and_metadata(tmp_path: Path, suffix: str) -> None:
    meta = {"captions": [{"text": "one", "origin": "synthetic"}, "two"], "caption": "three", "n": 1}
    members = [
        *sample("dir/a", "txt caption", meta),
        ("b.webp", encoded(picture(), "WEBP")),
        ("b.txt", b"b"),
    ]
    path = write_tar(tmp_path / f"x{suffix}", members, "w:gz" if suffix.endswith("gz") else "w")
    samples, refused = read(path)
    assert not refused
    assert [s.key for s in samples] == ["dir/a", "b"]
    first = samples[0]
    assert first.captions == (
        ("txt caption", "original"), ("three", "original"), ("one", "synthetic"), ("two",
                                                                                   "original")
    )  # fmt: skip
    assert first.meta == meta
    assert first.image == encoded(picture())
    reference = first.reference
    assert reference is not None
    assert (reference.file, reference.member) == (path.name, "dir/a.png")
    if suffix == ".tar":
        assert path.read_bytes()[reference.offset :][: reference.size] == first.image
    else:
        assert reference.offset is None


def test_members_that_are_no_part_of_a_sample_are_counted_and_never_decoded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "executed"),))

    members = [*sample("a"), ("a.pyd", pickle.dumps(Bomb())), ("a.pth", b"x"), ("a.pth", b"y")]
    path = write_tar(tmp_path / "x.tar", members)
    _, files, *_ = expand([str(path)])
    opened = OpenedSource(files[0])
    found = list(read_source(opened, FieldNames({}, (), False)))
    assert [type(f) for f in found] == [RawSample]
    assert opened.ignored == {".pyd": 1, ".pth": 2}
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["data", "header", "boundary", "text"])
def test_cut_tar_keeps_what_is_whole_and_says_what_is_lost(tmp_path: Path, where: str) -> None:
    members = [m for i in range(4) for m in sample(f"s{i}", f"caption {i}", seed=i)]
    whole = write_tar(tmp_path / "whole.tar", members)
    with tarfile.open(whole) as archive:
        third = archive.getmember("s2.png")
        text = archive.getmember("s2.txt")
        last = archive.getmember("s1.txt").offset
    cut = {
        "data": third.offset_data + 10,
        "header": third.offset + 100,
        "boundary": third.offset,
        "text": text.offset + 200,
    }[where]
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:cut])
    samples, refused = read(path)
    assert [s.key for s in samples] == ["s0", "s1"]
    assert refused[-1].what == "file"
    place = {"data": "inside member s2.png", "text": "after member s2.png"}.get(
        where, f"s1.txt at byte {last}"
    )
    assert place in refused[-1].reason
    if where in ("data", "text"):
        assert [r.key for r in refused if r.what == "sample"] == ["s2"]


def test_tar_with_a_damaged_header_in_the_middle_is_not_taken_for_its_end(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", [m for i in range(3) for m in sample(f"s{i}", seed=i)])
    with tarfile.open(whole) as archive:
        place = archive.getmember("s1.png").offset
    damaged = bytearray(whole.read_bytes())
    damaged[place : place + 100] = b"\xff" * 100
    whole.write_bytes(damaged)
    samples, refused = read(whole)
    assert [s.key for s in samples] == ["s0"]
    assert any(r.what == "file" for r in refused)


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100, gzip.compress(b"x" * 5000)])
def test_bytes_that_are_no_tar_are_one_refusal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    samples, refused = read(tmp_path / "x.tar")
    assert not samples
    assert [r.what for r in refused] == ["file"]


def test_cut_gzip_is_refused_not_fatal(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar.gz", [m for i in range(20) for m in sample(f"s{i}", seed=i)], "w:gz"
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    samples, refused = read(path)
    assert refused[-1].what == "file"
    assert all(s.image == encoded(picture(seed=int(s.key[1:]))) for s in samples)


def _link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (sample("../../evil"), "unsafe name"),
        (sample("/etc/evil"), "unsafe name"),
        ([_link("a.png", "/etc/passwd"), ("a.txt", b"x")], "symlink"),
        ([_link("a.png", "good.png", tarfile.LNKTYPE), ("a.txt", b"x")], "hard link"),
        ([_link("a.png", "", tarfile.CHRTYPE), ("a.txt", b"x")], "a device"),
        ([("a.png", b"1"), ("a.png", b"2"), ("a.txt", b"x")], "duplicate member"),
        ([("a.png", b"1"), ("a.jpg", b"2"), ("a.txt", b"x")], "two images"),
        ([("a.png", b"1"), ("a.txt", b"\xff\xfe")], "invalid UTF-8"),
        ([("a.png", b"1"), ("a.json", b"{")], "invalid JSON"),
        ([("a.png", b"1"), ("a.json", b"[" * 100_000)], "invalid JSON"),
        ([("a.png", b"1"), ("a.json", b"[1]")], "expected an object"),
        ([("a.png", b"1"), ("a.json", b'{"caption": "\xff"}')], "invalid UTF-8"),
        ([("a.png", b"1"), ("a.txt", b"x" * (17 << 20))], "member too large"),
    ],
)
def test_hostile_tar_members_are_refused_and_their_neighbours_kept(
    tmp_path: Path, members: list, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "deep" / "er"
    inner.mkdir(parents=True)
    path = write_tar(inner / "x.tar", [*sample("before"), *members, *sample("good")])
    before = sorted(p for p in tmp_path.rglob("*"))
    samples, refused = read(path)
    assert [s.key for s in samples] == ["before", "good"]
    assert len(refused) == 1
    assert reason in refused[0].reason
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_name_that_is_not_utf8_is_kept_readable(tmp_path: Path) -> None:
    members = sample("na\udcffme")
    with tarfile.open(
        tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape"
    ) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    samples, refused = read(tmp_path / "x.tar")
    assert len(samples) + len(refused) == 1


def test_extended_header_of_a_gigabyte_is_not_read_into_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    path = write_tar(tmp_path / "x.tar", sample("a"))
    content = path.read_bytes()
    end = content.rstrip(b"\0")
    body = content[: -(-len(end) // 512) * 512]
    path.write_bytes(body + info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
    samples, refused = read(path)
    assert [s.key for s in samples] == ["a"]
    assert "extended header" in refused[-1].reason


# -- tables, lines, folders ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "struct", "path", "none"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".stream.arrow"])
def test_tables_with_bytes_paths_or_captions_only(tmp_path: Path, kind: str, suffix: str) -> None:
    images = [encoded(picture(seed=i)) for i in range(3)]
    (tmp_path / "im").mkdir()
    for i, image in enumerate(images):
        (tmp_path / "im" / f"{i}.png").write_bytes(image)
    column = {
        "bytes": images,
        "struct": [{"bytes": image, "path": None} for image in images],
        "path": [f"im/{i}.png" for i in range(3)],
        "none": None,
    }[kind]
    columns = {
        "key": ["a", "b", "c"],
        "caption": ["A", "B", None],
        "recaption": [None, "synthetic B", "C"],
    }
    table = pa.table(columns | ({"image": column} if column else {}))
    path = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        new = pa.ipc.new_stream if "stream" in suffix else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    samples, refused = read(path)
    assert not refused
    assert [s.key for s in samples] == ["a", "b", "c"]
    assert samples[1].captions == (("B", "original"), ("synthetic B", "synthetic"))
    assert [s.image for s in samples] == ([None] * 3 if kind == "none" else images)


def test_broken_table_is_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"caption": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-10])
    assert [r.what for r in read(path)[1]] == ["file"]


def test_jsonl_with_images_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(picture()))
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    for secret in (tmp_path / "secret.png", outside / "secret.png"):
        secret.write_bytes(encoded(picture()))
    (tmp_path / "images" / "out").symlink_to(outside)
    rows = [
        {"file_name": "images/a.png", "text": "a", "id": 7},
        {"file_name": "../secret.png", "text": "b"},
        {"file_name": "/etc/passwd", "text": "c"},
        {"file_name": "images/absent.png", "text": "d"},
        {"file_name": "images/out/secret.png", "text": "e"},
        {"text": "no image"},
        {"file_name": "s3://bucket/x.png", "text": "f"},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b"\n".join([lines[0], b"{broken", b"", b'"text"', b'{"text": "\xff"}', *lines[1:]]) + b"\n"
    )
    samples, refused = read(path)
    assert [(s.key, s.captions) for s in samples] == [("7", (("a", "original"),))]
    assert samples[0].reference is not None
    assert samples[0].reference.file == "images/a.png"
    reasons = " | ".join(r.reason for r in refused)
    assert len(refused) == 9
    for expected in (
        "invalid JSON",
        "expected an object",
        "invalid UTF-8",
        "unsafe name",
        "does not exist",
        "link out",
    ):
        assert expected in reasons


def test_csv_rows_and_invalid_bytes(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b'key,caption\na,"two, parts"\nb,bad \xff\nc,"over\ntwo lines"\n')
    samples, refused = read(path)
    assert not refused
    assert [s.captions[0][0] for s in samples] == ["two, parts", "bad \udcff", "over\ntwo lines"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_csv_of_other_spreadsheets(delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    rows = [("file_name", "caption"), ("a.png", "zwei, drei"), ("b.png", "vier")]
    path.write_text(
        "\ufeff" + "".join(delimiter.join(row) + "\n" for row in rows), encoding="utf-8"
    )
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(picture()))
    samples, refused = read(path)
    assert not refused
    assert [s.captions[0][0] for s in samples] == ["zwei, drei", "vier"]
    assert all(s.image for s in samples)


def test_a_caption_that_holds_a_semicolon_is_one(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("caption\na cat; a dog\n")
    assert [s.captions[0][0] for s in read(path)[0]] == ["a cat; a dog"]
    path.write_text("caption;x,id\na cat; a dog,1\n")  # a comma separates: nothing else is tried
    assert [s.captions for s in read(path)[0]] == [()]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_utf_16_is_told(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"d.{kind}"
    path.write_text("caption\na cat\n", encoding="utf-16")
    samples, refused = read(path)
    assert not samples
    remedy = "save it as UTF-8, or convert it: iconv -f UTF-16 -t UTF-8"
    assert [(r.reason, r.what) for r in refused] == [
        (f"not in UTF-8: d.{kind} is UTF-16; {remedy}", "file")
    ]


def test_a_header_that_cannot_be_read_is_one_refusal(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("caption," + "x" * (17 << 20) + "\na,b\n")
    samples, refused = read(path)
    assert not samples
    assert [r.reason for r in refused] == [
        "invalid CSV: the header cannot be read: field larger than field limit (16777216)"
    ]


def test_plain_text_is_one_caption_per_line(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes("first\r\n两只猫\n".encode() + b"\xff\n" + b"x" * (17 << 20) + b"\nlast")
    samples, refused = read(path)
    assert [s.captions[0][0] for s in samples] == ["first", "两只猫", "last"]
    assert [s.key for s in samples] == ["c.txt:1", "c.txt:2", "c.txt:5"]
    assert ["invalid UTF-8" in refused[0].reason, "too long" in refused[1].reason] == [True, True]


def test_image_folders_with_captions_or_classes(tmp_path: Path) -> None:
    for label in ("n01440764", "n01443537"):
        (tmp_path / label).mkdir()
        for i in range(2):
            (tmp_path / label / f"{label}_{i}.JPEG").write_bytes(encoded(picture(seed=i), "JPEG"))
    (tmp_path / "n01440764" / "n01440764_0.txt").write_text("a tench")
    (tmp_path / "n01440764" / "n01440764_1.json").write_text('{"caption": "from json"}')
    (tmp_path / "n01443537" / "evil.png").symlink_to("/etc/passwd")
    samples, refused = read(tmp_path)
    assert [s.label for s in samples] == ["n01440764"] * 2 + ["n01443537"] * 2
    assert [s.captions for s in samples] == [
        (("a tench", "original"),),
        (("from json", "original"),),
        (),
        (),
    ]
    assert ["link out of its folder" in r.reason for r in refused] == [True]


# -- finding sources -------------------------------------------------------------------------------


def test_what_a_person_types_becomes_an_ordered_list(tmp_path: Path) -> None:
    for name in ("b/1.tar", "b/0.tar", "a/2.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, sample("x"))
    (tmp_path / "b" / "0.parquet").write_bytes(b"img2dataset keeps its log beside the tars")
    (tmp_path / "b" / "0_stats.json").write_text("{}")
    expected = ["a/2.tar", "b/0.tar", "b/1.tar"]
    for sources in (
        [str(tmp_path)],
        [f"{tmp_path}/*/*.tar"],
        [f"{tmp_path}/**/*.tar"],
        [f"{tmp_path}/b/{{0..1}}.tar", f"{tmp_path}/a"],
        [f"{tmp_path}/b", f"{tmp_path}/a/2.tar", f"{tmp_path}/b/1.tar"],
    ):
        root, files, *_ = expand(sources)
        assert (root, [f.name for f in files]) == (str(tmp_path), expected), sources
    assert [f.name for f in expand([f"{tmp_path}/b/1.tar"])[1]] == ["1.tar"]


def test_a_url_without_its_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # importing it fails as where it is not installed
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # another test may have imported it
    for source in ("s3://bucket/x.tar", "nosuch://bucket/x.tar"):
        message = f"{source}: cannot be opened .*; install the fsspec package"
        with pytest.raises(InputError, match=message) as caught:
            expand([source])
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(InputError, match=message):
            open_binary(source)


def test_sources_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.xyz").write_text("")
    for source, message in (
        (tmp_path / "absent.tar", "no such file"),
        (tmp_path / "empty", "nothing here to ingest"),
        (tmp_path / "*.tar", "nothing here to ingest"),
        (tmp_path / "x.xyz", "unknown kind of source"),
    ):
        with pytest.raises(InputError, match=message):
            expand([str(source)])
