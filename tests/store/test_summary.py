"""What `lidit inspect` counts."""

import shutil
from pathlib import Path

import pyarrow as pa

from lidit.store import Corpus, Sample, publish_corpus, publish_unit, unit_tables
from lidit.store.files.folder import Folder
from lidit.store.summary import plot_corpus, summarise

UNITS = [("64x64", "32x96", "64x64"), ("96x32", "64x64"), ()]


def corpus_of(path: Path, units: list[tuple[str | None, ...]]) -> Corpus:
    folder, rows = Folder.at(path), []
    for unit, buckets in enumerate(units):
        samples = [
            Sample(f"{unit}-{i}", ((f"c{i}", "original"),), bucket=b) for i, b in enumerate(buckets)
        ]
        rows.append(publish_unit(folder, unit, 5, f"{unit}.tar", *unit_tables(samples)))
    sources = pa.table({"file": [f"{unit}.tar" for unit in range(len(units))]})
    return publish_corpus(folder, rows, 5, "/nowhere", sources, {}, {"refused": 0})


def test_buckets_are_counted_without_opening_a_samples_file(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", UNITS)
    shutil.rmtree(tmp_path / "corpus" / "samples")
    found = summarise(corpus)
    assert found.buckets == {"32x96": 1, "64x64": 3, "96x32": 1}
    assert (found.units, found.samples, found.distinct_captions) == (3, 5, 3)
    assert [path.name for path in plot_corpus(corpus, tmp_path / "plots")] == ["buckets.png"]


def test_a_corpus_of_captions_has_no_buckets(tmp_path: Path) -> None:
    assert summarise(corpus_of(tmp_path / "corpus", [(None, None)])).buckets == {}
