"""What a source file comes to in an ingest: names of any bytes, refusals in any number, readers
that fail.
"""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from lidit.config import IngestSettings
from lidit.errors import InputError, JobError
from lidit.sources import expand, staging
from lidit.sources.base import IGNORED_KINDS, OTHER_KINDS
from lidit.sources.staging import stage_source
from lidit.store.files.folder import Folder
from tests.helpers.pictures import encoded, picture, sample, write_tar
from tests.helpers.source_reading import stage

CAFE = os.fsdecode(b"caf\xe9")  # Latin-1: no UTF-8, a surrogate in Python
SMALL = {"resolution": 32, "bucket_multiple": 8}


def latin_tar(path: Path, names: dict[str, bytes]) -> Path:
    """tarfile writes such names by itself only in a locale of theirs."""
    write_tar(path, [(name.replace(CAFE, "CAFE"), content) for name, content in names.items()])
    content = bytearray(path.read_bytes())
    while (place := content.find(b"CAFE")) >= 0:
        content[place : place + 4] = b"caf\xe9"
        start = place // 512 * 512
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)
    return path


def test_tar_names_that_are_no_utf8(tmp_path: Path) -> None:
    image = encoded(picture())
    names = {"a.png": image, "a.txt": b"red", f"a.{CAFE}.npy": b"x", f"a.{CAFE}": b"x"}
    bad = {
        f"{CAFE}.png": image,
        f"{CAFE}.jpg": image,
        f"{CAFE}.txt": b"red",
        f"x{CAFE}.png": image,
        f"x{CAFE}.txt": b"x",
    }
    records, samples, refused = stage(latin_tar(tmp_path / "x.tar", names | bad), **SMALL)
    assert [s["key"] for s in samples] == ["a"]
    assert records[0].ignored == {".npy": 1, ".caf\\udce9": 1}
    assert [r["key"] for r in refused] == ["caf\\udce9", "xcaf\\udce9"]
    assert "two images" in refused[0]["reason"]
    assert "invalid UTF-8: the key" in refused[1]["reason"]


def test_rows_and_pictures_whose_names_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    for name in ("a", CAFE):
        (tmp_path / "csv" / f"{name}.png").write_bytes(encoded(picture()))
    rows = f"id,image,caption\n{CAFE},,red\nb,a.png,red\n{CAFE},a.png,red\nc,{CAFE}.png,red\n"
    (tmp_path / "csv" / "x.csv").write_bytes(os.fsencode(rows))
    _, samples, refused = stage(tmp_path / "csv" / "x.csv", **SMALL)
    assert [s["key"] for s in samples] == ["b"]
    assert [r["key"] for r in refused] == ["caf\\udce9", "caf\\udce9", "c"]
    assert [r["reason"].partition(":")[0] for r in refused] == [
        "no image",
        "invalid UTF-8",
        "invalid UTF-8",
    ]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a", CAFE, f"b{CAFE}"):
        (pictures / f"{name}.png").write_bytes(encoded(picture()))
        (pictures / f"{name}.txt").write_text("red")
    (pictures / f"{CAFE}.json").write_text("{bad")
    _, samples, refused = stage(pictures, **SMALL)
    assert [s["key"] for s in samples] == ["a"]
    assert [(r["key"], r["file"]) for r in refused] == [
        ("bcaf\\udce9", ""),
        ("caf\\udce9", "caf\\udce9.png"),
    ]


def test_a_source_whose_name_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / f"{CAFE}.txt").write_text("red\n")
    with pytest.raises(InputError, match=r"caf\\udce9\.txt: this name is not UTF-8"):
        expand([str(tmp_path)])


def test_a_brace_without_its_other_one_is_named() -> None:
    with pytest.raises(InputError, match=r"data/\{a\.tar: a brace"):
        expand(["data/{a.tar"])


def test_ignored_members_are_a_short_list_whatever_their_names(tmp_path: Path) -> None:
    dotted = [(f"img.{i:04d}.{suffix}", b"x") for i in range(100) for suffix in ("png", "txt")]
    hashes = [(f"b.h{i}", b"x") for i in range(100)]
    (record,), _, _ = stage(
        write_tar(tmp_path / "x.tar", [*sample("a"), *dotted, ("LICENSE", b"x"), *hashes]), **SMALL
    )
    dotted_kinds = [
        record.ignored[f".{suffix} behind a second dot in its name"] for suffix in ("png", "txt")
    ]
    assert (*dotted_kinds, record.ignored["no suffix"]) == (100, 100, 1)
    assert len(record.ignored) == IGNORED_KINDS + 1
    assert record.ignored[OTHER_KINDS] == 100 - (IGNORED_KINDS - 3)


def test_a_score_beyond_every_number_is_no_score(tmp_path: Path) -> None:
    members = [
        ("a.png", encoded(picture())),
        ("a.txt", b"x"),
        ("a.json", b'{"aesthetic": 1' + b"0" * 400 + b"}"),
    ]
    _, _, refused = stage(write_tar(tmp_path / "x.tar", members), min_aesthetic=4.7, **SMALL)
    assert ["no aesthetic score" in r["reason"] for r in refused] == [True]


def test_refusals_are_written_in_tables_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [
        {"captions": ["good", "x" * 5000]} if row % 2 else {"id": "nothing"}
        for row in range(10_000)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (record,), samples, refused = stage(path, max_caption_chars=100)
    assert (record.samples, record.refused, record.refused_captions) == (
        5000,
        {"no caption": 5000},
        5000,
    )
    assert [r["what"] for r in refused] == ["sample", "caption"] * 5000
    assert len(samples) == 5000
    with pa.ipc.open_file(str(tmp_path / "staged-x.jsonl" / "000000-refused.arrow")) as reader:
        sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
    assert sizes == [4096, 4096, 1808]


def test_an_error_nobody_thought_of_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("deep inside")

    path = write_tar(tmp_path / "x.tar", sample("a"))
    _, files, *_ = expand([str(path)])
    folder = Folder.at(tmp_path / "staged")
    folder.create()
    monkeypatch.setattr(staging, "read_source", broken)
    with pytest.raises(
        JobError, match=r"x\.tar: cannot be read \(ZeroDivisionError: deep " r"inside\)"
    ) as caught:
        stage_source(folder, files[0], 0, IngestSettings())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert list((tmp_path / "staged").iterdir()) == []
