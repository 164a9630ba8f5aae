"""What a person is told of an ingest, and what of it goes into corpus.json."""

import pytest

from jobs.ingest import show
from lidit.sources.base import IGNORED_KINDS, OTHER_KINDS
from lidit.sources.ingest import IngestSummary, _ignored
from lidit.sources.staging import StagedSource


def staged(index: int, ignored: dict[str, int]) -> StagedSource:
    return StagedSource(index, f"{index}.tar", 0, "", "", 0, 0, {}, 0, ignored)


def test_ignored_members_of_many_sources_are_a_short_list() -> None:
    sources = [staged(i, {".npy": 3, f".x{i:03d}": 1, OTHER_KINDS: 2}) for i in range(100)]
    found = _ignored(sources)
    assert len(found) == IGNORED_KINDS + 1
    assert found[".npy"] == 300
    assert found[OTHER_KINDS] == 200 + 100 - (IGNORED_KINDS - 1)
    assert _ignored(sources[:1]) == {".npy": 3, ".x000": 1, OTHER_KINDS: 2}
    assert _ignored([]) == {}


def test_what_was_left_out_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show("c", IngestSummary("c", "", 1, 2, 2, 0, 0, {}, {".npy": 3, ".png": 5}))
    assert "left out 3 x .npy, 5 x .png" in capsys.readouterr().out
    show("c", IngestSummary("c", "", 1, 2, 2, 0, 0))
    assert "left out" not in capsys.readouterr().out
