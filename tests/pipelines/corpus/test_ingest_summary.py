"""What a person is told of an ingest, and what of it goes into corpus.json."""

import pytest

from jobs.ingest import show
from lidit.sources.base import IGNORED_KINDS, OTHER_KINDS
from lidit.sources.ingest import IngestSummary, _ignored
from lidit.sources.staging import StagedSource


def staged(index: int, ignored: dict[str, int]) -> StagedSource:
    return StagedSource(index, f"{index}.tar", 0, "", "", 0, 0, {}, 0, ignored, {}, 0)


def test_ignored_members_of_many_sources_are_a_short_list() -> None:
    sources = [staged(i, {".npy": 3, f".x{i:03d}": 1, OTHER_KINDS: 2}) for i in range(100)]
    found = _ignored(sources, {})
    assert len(found) == IGNORED_KINDS + 1
    assert found[".npy"] == 300
    assert found[OTHER_KINDS] == 200 + 100 - (IGNORED_KINDS - 1)
    assert _ignored(sources[:1], {}) == {".npy": 3, ".x000": 1, OTHER_KINDS: 2}
    assert _ignored([], {}) == {}
    assert _ignored(sources[:1], {".npy": 4, "hidden .git/": 1}) == {
        ".npy": 7, ".x000": 1, "hidden .git/": 1, OTHER_KINDS: 2
    }  # fmt: skip


def test_what_was_left_out_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show("c", IngestSummary("c", "", 1, 2, 2, 0, 0, {}, {".npy": 3, ".png": 5}))
    assert "left out 3 x .npy, 5 x .png" in capsys.readouterr().out
    show("c", IngestSummary("c", "", 1, 2, 2, 0, 0))
    assert "left out" not in capsys.readouterr().out


def test_images_columns_and_joined_rows_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    told = ("columns found: filepath (image path)", "captions only, without images: ...")
    ignored = {".jpg behind a second dot in its name": 1, ".txt beside .tar": 2}
    show("c", IngestSummary("c", "", 1, 2, 3, 0, 0, {}, ignored, images=0, joined=4, told=told))
    assert capsys.readouterr().out.splitlines() == [
        "c: 2 samples (0 with images), 3 captions in 1 units, made in 0 s",
        "  columns found: filepath (image path)",
        "  captions only, without images: ...",
        "  joined 4 rows of one key and image: their captions are one sample's",
        "  left out 1 x .jpg behind a second dot in its name, 2 x .txt beside .tar: no part of "
        "a sample",
        "  a key ends at the first dot of its name: call img.0001.jpg img_0001.jpg",
        "  one kind of file is read of each folder: name the others as sources of their own to "
        "read them",
    ]
