"""Which captions units repeat, and each of them once: a unit holds distinct captions, and may hold
those of earlier units, too.

CORPUS/distinct is a corpus of the same units, each with the captions that no earlier unit has. Who
owns a caption follows from the corpus alone, so what is computed for it does not depend on which
unit comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lidit.store.corpus import CORPUS_FILE, Corpus, publish_corpus, publish_unit
from lidit.store.families import TextFamily
from lidit.store.schema import SAMPLES, with_metadata

FOLDER = "distinct"
DIGEST_WORDS = 2  # of 64 bits, of a caption's sha256: two captions in 2^128 are alike
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class CaptionIndex:
    """Where each caption of a corpus stands among the distinct ones: [captions] each, units one
    after the other.

    units: the first unit that has it; rows: its row among the captions that are new in that unit.
    """

    starts: Ints  # [units + 1]
    units: Ints
    rows: Ints

    @classmethod
    def of(cls, corpus: Corpus) -> CaptionIndex:
        """Read every caption's digest: about 60 bytes of memory per caption while it is made."""
        parts = [_digests(corpus, unit) for unit in range(corpus.num_units)]
        starts = np.cumsum([0, *(len(part) for part in parts)])
        digests = np.concatenate(parts) if parts else np.zeros((0, DIGEST_WORDS), np.uint64)
        # A stable sort keeps equal captions in the order of units: the first of each group owns it.
        order = np.lexsort(digests.T)
        first = np.ones(len(order), bool)
        first[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
        owner = np.empty(len(order), np.int64)
        owner[order] = order[np.flatnonzero(first)][np.cumsum(first) - 1]
        # Its row among the new captions of its unit: how many new ones stand before it there.
        new = owner == np.arange(len(owner))
        before = np.concatenate([[0], np.cumsum(new)])
        unit_of = np.repeat(np.arange(len(parts)), np.diff(starts))
        units = unit_of[owner]
        return cls(starts, units, before[owner] - before[starts[units]])

    def unit(self, unit: int) -> tuple[Ints, Ints]:
        """Owners' units and rows of one unit's captions."""
        part = slice(int(self.starts[unit]), int(self.starts[unit + 1]))
        return self.units[part], self.rows[part]

    @property
    def distinct(self) -> int:
        """How many captions differ."""
        return (
            len(np.unique(np.stack([self.units, self.rows], 1), axis=0)) if len(self.units) else 0
        )


def count_distinct(corpus: Corpus, limit: int = 20_000_000) -> int | None:
    """How many captions of a corpus differ; None above `limit` captions, whose digests take long to
    read.
    """
    return CaptionIndex.of(corpus).distinct if corpus.facts["totals"]["captions"] <= limit else None


def _digests(corpus: Corpus, unit: int) -> NDArray[np.uint64]:
    column = corpus.captions(unit)["sha256"].combine_chunks()
    content = b"".join(column.to_pylist())
    return np.frombuffer(content, np.uint64).reshape(-1, 4)[:, :DIGEST_WORDS].copy()


def distinct_corpus(corpus: Corpus, index: CaptionIndex) -> Corpus:
    """CORPUS/distinct, made unless it is there."""
    folder, digits = corpus.folder.child(FOLDER), int(corpus.facts["unit_digits"])
    made_from = {"distinct_of": corpus.digest}
    if folder.exists(CORPUS_FILE):
        known = Corpus.open(folder.location)
        if known.facts["settings"] == made_from:
            return known
    nothing = with_metadata(SAMPLES, kind="samples").empty_table()
    rows = []
    for unit in range(corpus.num_units):
        owners, _ = index.unit(unit)
        captions = corpus.captions(unit).take(pa.array(np.flatnonzero(owners == unit)))
        rows.append(publish_unit(folder, unit, digits, str(unit), nothing, captions))
    none = corpus.sources.slice(0, 0)
    return publish_corpus(folder, rows, digits, corpus.facts["root"], none, made_from, {})


def assembled_tables(
    family: TextFamily, owners: Ints, rows: Ints, most_tokens: int
) -> Iterator[pa.Table]:
    """One unit's rows in order, out of a family of `distinct_corpus`, as tables of about
    `most_tokens` tokens.
    """
    tables = {int(unit): _unit_table(family, int(unit)) for unit in np.unique(owners)}
    if not tables:
        yield _unit_table(family, 0).slice(0, 0)
        return
    tokens = np.empty(len(owners), np.int64)
    for unit, table in tables.items():
        mine = owners == unit
        tokens[mine] = table["tokens"].to_numpy()[rows[mine]]
    piece = np.cumsum(tokens) // max(1, most_tokens)
    for number in np.unique(piece):
        chosen = piece == number
        yield _gathered(tables, owners[chosen], rows[chosen])


def _gathered(tables: dict[int, pa.Table], owners: Ints, rows: Ints) -> pa.Table:
    order = np.argsort(owners, kind="stable")
    taken = [tables[int(unit)].take(pa.array(rows[owners == unit])) for unit in np.unique(owners)]
    return pa.concat_tables(taken).take(pa.array(np.argsort(order))).combine_chunks()


def _unit_table(family: TextFamily, unit: int) -> pa.Table:
    content = family.folder.map(family.record(unit)["file"], keep_local=True)
    return pa.ipc.open_file(pa.py_buffer(content)).read_all()
