"""One bad row of a table or text file is refused with its reason; the rows around it are kept."""

import base64
import errno
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lidit.sources import tables, text_files
from lidit.sources.tables import batches, image_bytes
from tests.helpers.pictures import encoded, picture
from tests.helpers.source_reading import read


def jsonl(folder: Path, *rows: dict) -> Path:
    (folder / "a.png").write_bytes(encoded(picture()))
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"image": "a.png", "caption": "good"}


# -- CSV, JSONL, plain text ------------------------------------------------------------------------


def test_captions_with_unquoted_commas_are_refused_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(
        "id,caption\n1,a red circle, left of a square, on "
        "grey\n2,whole\n3,trailing,,\n4,one, more\n"
    )
    samples, refused = read(path)
    assert [s.captions[0][0] for s in samples] == ["whole", "trailing"]
    assert [r.key for r in refused] == ["x.csv:2", "x.csv:5"]
    assert (
        refused[0].reason
        == "invalid CSV: line 2 has 2 more cells than the header; quote captions that hold "
        "commas"
    )
    assert "1 more cell than" in refused[1].reason


def test_images_that_begin_after_the_first_row_are_refused_not_lost(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"caption": "no image"}, GOOD, {"caption": "nor here", "image": None})
    samples, refused = read(path)
    assert [s.captions[0][0] for s in samples] == ["no image", "nor here"]
    assert len(refused) == 1
    assert (
        "unexpected image: field 'image' has one, the file's first row has none (line 2)"
        in refused[0].reason
    )
    assert len(read(path, captions_only=True)[0]) == 3


@pytest.mark.parametrize(
    "image",
    [
        base64.b64encode(encoded(picture()) * 100).decode(),
        "n" * 300 + ".png",
        "loop.png",
        "lone\ud800.png",
    ],
)
def test_a_bad_image_path_is_refused_and_shown_in_part(tmp_path: Path, image: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    samples, refused = read(
        jsonl(tmp_path, GOOD, {"image": image, "caption": "bad"}, GOOD | {"id": 3})
    )
    assert len(samples) == 2
    assert len(refused) == 1
    assert len(refused[0].reason) < 200
    assert image[:4] in refused[0].reason


def test_an_image_that_may_not_be_read_is_refused_but_not_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: str) -> None:
        raise OSError(number, "said the system", path)

    path = jsonl(tmp_path, GOOD)
    monkeypatch.setattr(text_files, "open_binary", failing)
    number = errno.EACCES
    assert [r.reason for r in read(path)[1]] == ["unreadable file: 'a.png': Permission denied"]
    number = errno.EIO
    with pytest.raises(OSError, match="said the system"):
        read(path)


def test_an_image_file_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "big.png").open("wb") as file:
        file.truncate((512 << 20) + 1)  # sparse: takes no room
    samples, refused = read(jsonl(tmp_path, {"image": "big.png", "caption": "x"}, GOOD))
    assert len(samples) == 1
    assert "file too large: 'big.png' has 536870913 bytes" in refused[0].reason


def test_links_that_lead_nowhere_in_an_image_folder_are_refused(tmp_path: Path) -> None:
    for key in ("a", "b"):
        (tmp_path / f"{key}.png").write_bytes(encoded(picture()))
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").symlink_to("b.txt")
    (tmp_path / "c.png").symlink_to("c.png")
    # with .json the name is too long for a file
    (tmp_path / f"{'n' * 251}.png").write_bytes(encoded(picture()))
    samples, refused = read(tmp_path)
    assert [s.key for s in samples] == ["a", "n" * 251]
    assert sorted(r.key for r in refused) == ["b", "c"]


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b"caption,id\nred,1\n"),
        ("x.csv", b'"caption",id\nred,1\n'),
        ("X.TSV", b"caption\tid\nred\t1\n"),
        ("x.txt", b"red\n"),
        ("x.jsonl", b'{"caption": "red"}\n'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_row(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(BOM + content)
    samples, refused = read(tmp_path / name)
    assert not refused
    assert [s.captions for s in samples] == [(("red", "original"),)]


# -- Parquet and Arrow -----------------------------------------------------------------------------


def test_one_value_that_python_cannot_hold_is_one_refused_row(tmp_path: Path) -> None:
    offsets = np.array([0, 3, 6, 9], np.int32)
    captions = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(b"redca\xe9sky"))
    times = pa.array([0, 0, 2**62], pa.timestamp("us"))
    path = tmp_path / "X.PARQUET"
    pq.write_table(pa.table({"caption": captions, "taken": times}), path)
    samples, refused = read(path)
    assert [s.captions[0][0] for s in samples] == ["red"]
    assert [r.key for r in refused] == ["X.PARQUET:1", "X.PARQUET:2"]
    assert "column caption: 'utf-8' codec can't decode" in refused[0].reason
    assert "column taken: " in refused[1].reason
    assert refused[1].reason.endswith("(row 2)")


def table(rows: int) -> pa.Table:
    return pa.table(
        {
            "image": [b"image %d" % row * 50 for row in range(rows)],
            "caption": [str(r) for r in range(rows)],
        }
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_arrow_batch_is_taken_in_parts(tmp_path: Path, stream: bool) -> None:
    path = tmp_path / "x.arrow"
    made = table(1000)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), made.schema) as writer:
        writer.write_table(made)
    found = list(batches(str(path)))
    assert max(batch.num_rows for _, batch in found) == tables._BATCH_ROWS
    assert [first for first, _ in found] == [0, 256, 512, 768]
    assert len(read(path)[0]) == 1000
    assert list(image_bytes(str(path), "image", {2, 700})) == [
        (2, b"image 2" * 50),
        (700, b"image 700" * 50),
    ]


def test_only_the_row_groups_with_wanted_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(table(1000), path, row_group_size=100, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    groups = pq.ParquetFile(path).metadata
    for group in (0, 4, 9):
        column = groups.row_group(group).column(0)
        place = column.data_page_offset
        content[place : place + 40] = b"\xff" * 40
    path.write_bytes(content)
    rows = {350, 399, 512}
    assert dict(image_bytes(str(path), "image", rows)) == {
        row: b"image %d" % row * 50 for row in rows
    }
    assert "broken table" in read(path)[1][-1].reason
