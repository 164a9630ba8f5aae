"""A folder is walked to its end: what it holds comes out or is counted by kind; nothing in it stops
an ingest."""

import json
import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lidit.config import IngestSettings
from lidit.errors import InputError
from lidit.sources import expand
from lidit.sources.changes import compare_sources
from lidit.sources.ingest import IngestSummary, ingest
from lidit.store import Corpus
from tests.helpers.pictures import encoded, picture, sample, write_tar
from tests.helpers.source_reading import read

SETTINGS = IngestSettings(resolution=32, bucket_multiple=8)


def pictures(folder: Path, count: int, suffix: str = ".png", text: str | None = ".txt") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        kind = "JPEG" if suffix.lower() in (".jfif", ".jpe", ".jpg") else "PNG"
        (folder / f"p{i}{suffix}").write_bytes(encoded(picture(seed=i), kind))
        if text:
            (folder / f"p{i}{text}").write_text(f"{folder.name} {i}")


def made(source: Path, tmp_path: Path, **changes: object) -> tuple[IngestSummary, Corpus]:
    summary = ingest([str(source)], str(tmp_path / "corpus"), SETTINGS.model_copy(update=changes))
    return summary, Corpus.open(tmp_path / "corpus")


def keys(corpus: Corpus) -> list[str]:
    return [
        key for unit in range(corpus.num_units) for key in corpus.samples(unit)["key"].to_pylist()
    ]


# -- links, hidden folders, unknown suffixes -------------------------------------------------------


def test_linked_folders_are_read_once_and_loops_are_named(tmp_path: Path) -> None:
    data = tmp_path / "data"
    pictures(data / "own", 2)
    pictures(tmp_path / "disk" / "far" / "deep", 3)
    (data / "far").symlink_to(tmp_path / "disk" / "far")
    (data / "again").symlink_to(data / "own")
    (data / "own" / "up").symlink_to(data)
    (tmp_path / "disk" / "far" / "whole").symlink_to("/")
    summary, corpus = made(data, tmp_path)
    assert keys(corpus) == ["far/deep/p0", "far/deep/p1", "far/deep/p2", "own/p0", "own/p1"]
    assert summary.images == 5
    assert summary.ignored == {"link back to a folder that is read anyway": 3}


def test_what_systems_leave_in_a_folder_is_left_out_and_counted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    pictures(data, 1)
    for name in (".ipynb_checkpoints", ".git/objects", "__MACOSX", "sub/@eaDir", ".thumbnails"):
        pictures(data / name, 2)
    for name in ("._p0.png", "._p0.txt", ".DS_Store", "Thumbs.db"):
        (data / name).write_bytes(b"x")
    summary, corpus = made(data, tmp_path)
    assert keys(corpus) == ["p0"]
    assert summary.ignored == {
        "hidden ._*": 2, "hidden .DS_Store": 1, "hidden .git/": 1, "hidden .ipynb_checkpoints/": 1,
        "hidden .thumbnails/": 1, "system @eaDir/": 1, "system Thumbs.db": 1, "system __MACOSX/": 1,
    }  # fmt: skip


def test_a_source_may_itself_be_hidden(tmp_path: Path) -> None:
    pictures(tmp_path / ".cache" / "set", 2)
    summary, _ = made(tmp_path / ".cache" / "set", tmp_path)
    assert (summary.samples, summary.ignored) == (2, {})


def test_rare_suffixes_of_images_and_captions(tmp_path: Path) -> None:
    data = tmp_path / "data"
    pictures(data / "a", 1, ".jfif", ".TXT")
    pictures(data / "b", 1, ".JPE", ".caption")
    pictures(data / "c", 1, ".png", ".Json")
    (data / "c" / "p0.Json").write_text('{"caption": "of the record"}')
    pictures(data / "d", 2, ".heic")
    pictures(data / "a", 1, ".avif", None)
    (data / "a" / "README.txt").write_text("about this set")
    summary, corpus = made(data, tmp_path)
    assert corpus.captions(0)["text"].to_pylist() == ["a 0"]
    assert [text for unit in range(3) for text in corpus.captions(unit)["text"].to_pylist()] == [
        "a 0", "b 0", "of the record"
    ]  # fmt: skip
    assert summary.ignored == {
        ".avif": 1,
        ".heic": 2,
        ".txt beside the images": 2,
        ".txt without an image": 1,
    }


def test_a_link_out_of_the_folder_is_refused_for_texts_and_tables(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    secret = tmp_path / "secret"
    secret.write_text('{"caption": "a password"}\n')
    (data / "a.jsonl").write_text('{"caption": "mine"}\n')
    (data / "b.jsonl").symlink_to(secret)
    (data / "inside.jsonl").symlink_to("a.jsonl")
    summary, corpus = made(data, tmp_path, unique_keys="file")
    texts = [
        text
        for unit in range(corpus.num_units)
        for text in corpus.captions(unit)["text"].to_pylist()
    ]
    assert texts == ["mine", "mine"]
    assert summary.reasons == {"unsafe name": 1}
    assert "link out of its folder" in next(iter(corpus.quarantine()))["reason"][0].as_py()
    assert [problem for _, problem in compare_sources(corpus)] == [None, None, None]
    # named by a person, it is meant
    assert expand([str(data / "b.jsonl")]).files[0].problem is None


@pytest.mark.timeout(60)
def test_pipes_devices_sockets_and_links_to_nothing_are_one_refusal_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "good.tar", sample("a"))
    os.mkfifo(data / "pipe.tar")
    (data / "zero.tar").symlink_to("/dev/zero")
    (data / "gone.tar").symlink_to("/nowhere/x.tar")
    (data / "loop.tar").symlink_to("loop.tar")
    monkeypatch.chdir(data)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.tar")
        summary, corpus = made(data, tmp_path)
        assert [problem for _, problem in compare_sources(corpus)] == [None] * 6
    assert keys(corpus) == ["a"]
    assert summary.reasons == {"no file": 1, "not a file": 3, "unreadable file": 1}
    assert ingest([str(data)], str(tmp_path / "corpus"), SETTINGS).skipped


def test_pipes_beside_images_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    (tmp_path / "p1.txt").unlink()
    os.mkfifo(tmp_path / "p1.txt")
    (tmp_path / "p2.png").unlink()
    os.mkfifo(tmp_path / "p2.png")
    samples, refused = read(tmp_path)
    assert [s.key for s in samples] == ["p0"]
    assert [r.reason for r in refused] == [
        "not a file: 'p1.txt' is a pipe",
        "not a file: 'p2.png' is a pipe",
    ]


# -- which kind is read ----------------------------------------------------------------------------


def img2dataset(folder: Path) -> None:
    """Two shards of files; every third picture could not be fetched."""
    for shard in ("00000", "00001"):
        rows = []
        (folder / shard).mkdir(parents=True)
        for i in range(6):
            key, fetched = f"{shard}{i:04d}", i % 3 != 2
            if fetched:
                (folder / shard / f"{key}.jpg").write_bytes(encoded(picture(seed=i), "JPEG"))
                (folder / shard / f"{key}.txt").write_text(f"caption {key}")
                (folder / shard / f"{key}.json").write_text(
                    json.dumps({"key": key, "caption": f"caption {key}"})
                )
            status = "success" if fetched else "failed_to_download"
            error = None if fetched else "HTTP Error 404"
            rows.append(
                {"url": "http://x/y.jpg", "caption": f"caption {key}", "key": key, "status": status,
                 "error_message": error}
            )  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard}.parquet")
        (folder / f"{shard}_stats.json").write_text("{}")


def test_files_of_img2dataset_are_read_as_images(tmp_path: Path) -> None:
    img2dataset(tmp_path / "out")
    summary, corpus = made(tmp_path / "out", tmp_path)
    assert (summary.samples, summary.images, summary.refused) == (8, 8, 0)
    assert keys(corpus)[:2] == ["00000/000000000", "00000/000000001"]
    assert summary.ignored == {".json": 2, ".parquet beside the images": 2}


def test_a_table_of_img2dataset_alone_never_counts_what_was_not_fetched(tmp_path: Path) -> None:
    img2dataset(tmp_path / "out")
    summary, _ = made(tmp_path / "out" / "00001.parquet", tmp_path)
    assert (summary.samples, summary.images) == (4, 0)
    assert summary.reasons == {"failed download": 2}
    assert any(line.startswith("captions only, without images") for line in summary.told)


def test_a_table_that_names_the_images_comes_before_texts_beside_them(tmp_path: Path) -> None:
    data = tmp_path / "data"
    pictures(data / "train", 2)
    pictures(data / "unnamed", 3, text=None)
    rows = [{"file_name": f"train/p{i}.png", "caption": f"of the table {i}"} for i in range(2)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary, corpus = made(data, tmp_path)
    assert corpus.captions(0)["text"].to_pylist() == ["of the table 0", "of the table 1"]
    assert summary.images == 2
    assert summary.ignored == {".txt beside .jsonl": 2, "image that no row names": 3}


def test_images_beside_tars_and_tables_of_bytes_are_counted(tmp_path: Path) -> None:
    for kind in ("tars", "bytes"):
        data = tmp_path / kind
        pictures(data / "loose", 3)
        (data / "notes.md").write_text("x")
        if kind == "tars":
            write_tar(data / "a.tar", sample("a"))
        else:
            pq.write_table(
                pa.table({"image": [encoded(picture())], "text": ["a"]}), data / "a.parquet"
            )
        summary, _ = made(data, tmp_path / f"of-{kind}")
        suffix = ".tar" if kind == "tars" else ".parquet"
        assert (summary.samples, summary.images) == (1, 1)
        assert summary.ignored == {".md": 1, f".png beside {suffix}": 3, f".txt beside {suffix}": 3}


def test_what_a_glob_matches_and_nobody_reads_is_counted(tmp_path: Path) -> None:
    pictures(tmp_path / "data", 2)
    expanded = expand([f"{tmp_path}/data/*"])
    assert [file.name for file in expanded.files] == ["p0.txt", "p1.txt"]
    assert expanded.left_out == {".png beside the sources": 2}


def test_nothing_to_read_says_what_was_found(tmp_path: Path) -> None:
    pictures(tmp_path / "data", 2, ".heic", None)
    with pytest.raises(InputError, match=r"nothing here to ingest \(found 2 x \.heic\); expected"):
        expand([str(tmp_path / "data")])


# -- names that look like patterns -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["we{ird", "set{1,2}", "a[0-9]b", "{", "x{1..3}y", "st*r"])
def test_a_path_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl").write_text('{"caption": "x"}\n')
    expected = ["0.jsonl", "1.jsonl", "2.jsonl"]
    for source in (str(folder), f"{folder}/*.jsonl", f"{folder}/{{0..2}}.jsonl"):
        assert [file.name for file in expand([source]).files] == expected, source
    (folder / "n{a}me.jsonl").write_text('{"caption": "x"}\n')
    assert [file.name for file in expand([f"{folder}/n{{a}}me.jsonl"]).files] == ["n{a}me.jsonl"]
