"""Which captions units repeat."""

from pathlib import Path

from lidit.store.distinct import CaptionIndex
from tests.helpers.corpus_factory import make_corpus

# Of 12 captions 7 differ; the last unit has none of its own.
UNITS = (
    ("a red circle", "a blue square", "", "two"),
    ("a blue square", "three of them", "a red circle"),
    ("four", "three of them", "a much longer caption of many words"),
    ("two", "four"),
)


def test_the_index_names_the_first_unit_that_has_a_caption(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", UNITS)
    index = CaptionIndex.of(corpus)
    assert index.distinct == 7
    for unit, captions in enumerate(UNITS):
        owners, rows = index.unit(unit)
        new = [
            [text for text in UNITS[o] if not any(text in earlier for earlier in UNITS[:o])]
            for o in range(4)
        ]
        found = [new[int(o)][int(r)] for o, r in zip(owners, rows, strict=True)]
        assert found == corpus.captions(unit)["text"].to_pylist()
        assert sorted(found) == sorted(captions)
