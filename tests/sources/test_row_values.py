"""Values of rows that were left behind or taken for something else: captions in lists, bytes in
metadata, columns."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lidit.config import IngestSettings
from lidit.errors import InputError
from lidit.sources.ingest import IngestSummary, ingest
from lidit.sources.reading import unit_images
from lidit.store import Corpus
from tests.helpers.pictures import encoded, picture
from tests.helpers.source_reading import read

SETTINGS = IngestSettings(resolution=32, bucket_multiple=8)
IMAGES = [encoded(picture(seed=i)) for i in range(4)]


def made(source: Path, tmp_path: Path, **changes: object) -> tuple[IngestSummary, Corpus]:
    folder = tmp_path / f"corpus{len(list(tmp_path.glob('corpus*')))}"
    summary = ingest([str(source)], str(folder), SETTINGS.model_copy(update=changes))
    return summary, Corpus.open(folder)


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# -- captions --------------------------------------------------------------------------------------


def test_captions_in_lists_and_in_bytes(tmp_path: Path) -> None:
    table = parquet(
        tmp_path / "x.parquet",
        text=pa.array([["one", "two"], ["three"], [], None], pa.list_(pa.string())),
        caption=pa.array(["zwei Häuser".encode(), b"four", b"five", b"bad \xff"], pa.binary()),
    )
    samples, refused = read(table)
    assert not refused
    assert [[text for text, _ in s.captions] for s in samples] == [
        ["zwei Häuser", "one", "two"], ["four", "three"], ["five"], ["bad \udcff"]
    ]  # fmt: skip
    summary, _ = made(table, tmp_path)
    assert summary.reasons == {"invalid UTF-8": 1}


def test_captions_of_rows_in_every_form(tmp_path: Path) -> None:
    rows = [
        {"caption": ["a", "b"]},
        {"captions": "one text"},
        {"captions": [{"caption": "c"}, {"text": "d", "origin": "synthetic"}, 5]},
        {"synthetic_caption": ["e"]},
        {"caption": float("nan"), "text": "f"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, _ = read(tmp_path / "x.jsonl")
    assert [s.captions for s in samples] == [
        (("a", "original"), ("b", "original")),
        (("one text", "original"),),
        (("c", "original"), ("d", "synthetic")),
        (("e", "synthetic"),),
        (("f", "original"),),
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_of_one_key_and_image_are_captions_of_one_sample(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for caption in range(3):  # not side by side, as in COCO
        for i in range(2):
            (data / f"{i}.png").write_bytes(IMAGES[i])
            rows.append(
                {"image_id": 50 + i, "file_name": f"{i}.png", "caption": f"{caption} of {i}"}
            )
    rows.append({"image_id": 51, "file_name": "0.png", "caption": "of another image"})
    rows.append({"image_id": 50, "file_name": "0.png", "caption": "0 of 0"})
    if kind == "csv":
        lines = ["image_id,file_name,caption", *(",".join(map(str, row.values())) for row in rows)]
        (data / "x.csv").write_text("\n".join(lines) + "\n")
    elif kind == "jsonl":
        (data / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with_bytes = [{**row, "image": (data / row["file_name"]).read_bytes()} for row in rows]
        pq.write_table(pa.Table.from_pylist(with_bytes), data / "x.parquet")
    summary, corpus = made(data / f"x.{kind}", tmp_path)
    assert (summary.samples, summary.images, summary.joined) == (2, 2, 5)
    assert summary.reasons == {"duplicate key": 1}
    texts = corpus.captions(0)["text"].to_pylist()
    captions = [
        [texts[entry["index"]] for entry in row]
        for row in corpus.samples(0)["captions"].to_pylist()
    ]
    assert captions == [["0 of 0", "1 of 0", "2 of 0"], ["0 of 1", "1 of 1", "2 of 1"]]
    assert list(unit_images(corpus, 0)) == IMAGES[:2]
    assert corpus.sources["samples"].to_pylist() == [2]
    assert corpus.sources["refused"].to_pylist() == [1]
    again = ingest([str(data / f"x.{kind}")], corpus.folder.location, SETTINGS)
    assert (again.skipped, again.joined, again.told) == (True, 5, summary.told)


# -- images and metadata ---------------------------------------------------------------------------


def test_bytes_never_reach_the_metadata_at_any_depth(tmp_path: Path) -> None:
    table = parquet(
        tmp_path / "x.parquet",
        image=[{"bytes": IMAGES[0], "path": "a.png"}],
        mask=[{"bytes": IMAGES[1] * 20, "path": "m.png"}],
        layers=[
            [
                {"name": "sky", "picture": {"bytes": IMAGES[2] * 20}},
                {"name": "sea", "picture": {"bytes": None}},
            ]
        ],
        raw=[[IMAGES[3], IMAGES[3]]],
        caption=["a caption"],
    )
    _, corpus = made(table, tmp_path)
    assert json.loads(corpus.samples(0)["meta"][0].as_py()) == {
        "mask": {"path": "m.png"},
        "layers": [{"name": "sky", "picture": {}}, {"name": "sea", "picture": {"bytes": None}}],
        "raw": [],
        "caption": "a caption",
    }


def test_a_list_with_one_image_is_read_where_a_setting_names_it(tmp_path: Path) -> None:
    struct = [[{"bytes": IMAGES[0], "path": "a"}], [{"bytes": b"x", "path": "b"}] * 2, []]
    table = parquet(tmp_path / "x.parquet", images=struct, caption=["a", "b", "c"])
    summary, _ = made(table, tmp_path)
    assert (summary.samples, summary.images) == (3, 0)
    assert summary.told == (
        "columns found: caption (word, a caption), images (list<element: struct<bytes: binary, "
        "path: string>>)",
        "captions only, without images: no column is called image, jpg, png, image_path, "
        "file_name, path; set "
        "captions_only=true where that is meant",
        "'image_fields=[images]' takes images from images",
    )
    summary, corpus = made(table, tmp_path, image_fields=("images",))
    assert (summary.samples, summary.images) == (1, 1)
    assert summary.reasons == {"no image": 1, "several images": 1}
    assert list(unit_images(corpus, 0)) == IMAGES[:1]


@pytest.mark.parametrize("name", ["filepath", "img", "jpeg_path"])
def test_images_named_by_another_column_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "0.webp").write_bytes(encoded(picture(), "WEBP"))
    (tmp_path / "x.csv").write_text(f"{name},caption,score\nim/0.webp,two words,4\n")
    summary, _ = made(tmp_path / "x.csv", tmp_path)
    assert summary.images == 0
    assert (
        summary.told[0] == f"columns found: caption (text, a caption), {name} (image path), score "
        "(number)"
    )
    assert summary.told[-1] == f"'image_fields=[{name}]' takes images from {name}"
    summary, _ = made(tmp_path / "x.csv", tmp_path, image_fields=(name,))
    assert (summary.samples, summary.images) == (1, 1)
    assert not any("takes" in line or "only" in line for line in summary.told)


def test_captions_that_nobody_takes_are_told(tmp_path: Path) -> None:
    table = parquet(tmp_path / "x.parquet", image=IMAGES[:1], prompt=["a long text"], id=[7])
    found = r"1 x no caption.*first refusal is.*; found fields prompt, id.*prompt \(text\).*"
    with pytest.raises(InputError, match=found + r"caption_fields=\{prompt: original\}"):
        made(table, tmp_path)
    summary, _ = made(table, tmp_path, caption_fields={"prompt": "original"})
    assert (summary.samples, summary.images, summary.captions) == (1, 1, 1)


def test_captions_only_by_request_needs_no_warning(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    summary, _ = made(tmp_path / "x.txt", tmp_path, captions_only=True)
    assert summary.told == ()
    summary, _ = made(tmp_path / "x.txt", tmp_path)
    assert [line.partition(":")[0] for line in summary.told] == ["captions only, without images"]
