"""The samples of a corpus as training sees them: buckets, captions and the rows held out for
validation.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lidit.config import DataSettings
from lidit.data.held_out import held_out_counts, held_out_rows
from lidit.data.order import Ints, Order
from lidit.errors import InputError
from lidit.store import Corpus

UNITS_KEPT = 64
LEFT_OUT = -1

Part = Literal["train", "validation"]


@dataclass(frozen=True)
class UnitRows:
    """One unit's samples. Captions of row r: `caption[offset[r]:offset[r + 1]]`, chosen by their
    weights.
    """

    keys: list[str]
    bucket: Ints  # [rows]
    offset: Ints  # [rows + 1]
    caption: Ints  # [captions of all rows] indices into captions/
    # [captions of all rows + 1] sum of the weights before each caption
    cumulative: NDArray[np.float64]

    def choose(self, rows: Ints, u: NDArray[np.float64]) -> Ints:
        """The caption of each of `rows` that its uniform number in `u` picks, by origin weight."""
        low, high = self.cumulative[self.offset[rows]], self.cumulative[self.offset[rows + 1]]
        # rounding must not reach the next row
        wanted = np.minimum(low + u * (high - low), np.nextafter(high, 0.0))
        return np.asarray(self.caption[np.searchsorted(self.cumulative, wanted, side="right") - 1])


class Rows:
    """The training rows (`part="train"`) or the held-out rows (`part="validation"`) of every unit
    of a corpus.
    """

    def __init__(self, corpus: Corpus, settings: DataSettings, part: Part = "train") -> None:
        self.corpus, self.settings, self.part = corpus, settings, part
        self.buckets, totals = bucket_counts(corpus)
        self.held_out = held_out_counts(totals, settings)
        self.counts = self.held_out if part == "validation" else totals - self.held_out
        self._cache: OrderedDict[int, UnitRows] = OrderedDict()
        self._lock = threading.Lock()

    def order(self, batch_size: int, by_unit: bool = False) -> Order:
        """The order in which global batches of `batch_size` take these rows; see `Order`."""
        return Order(
            self.counts,
            self.buckets_of,
            batch_size,
            self.settings.seed,
            self.settings.window_units,
            by_unit,
        )

    def unit(self, unit: int) -> UnitRows:
        with self._lock:
            if unit not in self._cache:
                self._cache[unit] = self._read(unit)
                while len(self._cache) > max(UNITS_KEPT, 2 * self.settings.window_units):
                    self._cache.popitem(last=False)
            self._cache.move_to_end(unit)
            return self._cache[unit]

    def buckets_of(self, unit: int) -> Ints:
        """Bucket of each row of the unit; LEFT_OUT for rows of the other part."""
        rows = self.unit(unit)
        out = held_out_rows(unit, rows.bucket, self.held_out[unit], self.settings.seed)
        return np.where(out == (self.part == "validation"), rows.bucket, LEFT_OUT)

    def _read(self, unit: int) -> UnitRows:
        table = self.corpus.samples(unit)
        captions = table.column("captions").combine_chunks()
        flat = captions.flatten()
        origins = flat.field("origin").to_pylist()
        weights = self.settings.origin_weights
        names = {name: index for index, name in enumerate(self.buckets)}
        lengths = captions.value_lengths().to_numpy(zero_copy_only=False)
        offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        weight = np.array([weights.get(origin, 0.0) if weights else 1.0 for origin in origins])
        before = np.concatenate([[0.0], np.cumsum(weight)])
        # A sample none of whose origins has a weight still must be seen.
        weight[np.repeat(before[offset[1:]] == before[offset[:-1]], lengths)] = 1.0
        return UnitRows(
            keys=table.column("key").to_pylist(),
            bucket=np.array([names[name] for name in table.column("bucket").to_pylist()], np.int64),
            offset=offset,
            caption=flat.field("index").to_numpy(zero_copy_only=False).astype(np.int64),
            cumulative=np.concatenate([[0.0], np.cumsum(weight)]),
        )


def require_held_out(corpus: Corpus, settings: DataSettings, batch_size: int) -> None:
    """Raise InputError where no bucket's held-out samples fill a batch: told before training
    begins.
    """
    counts = Rows(corpus, settings, "validation").counts.sum(0)
    if not (counts >= batch_size).any():
        raise InputError(
            f"data.validation_fraction: only {counts.sum()} samples are held out, fewer than "
            f"one batch of {batch_size}"
            f"{' in any bucket' if len(counts) > 1 else ''}; raise it or lower train.batch_size"
        )


def bucket_counts(corpus: Corpus) -> tuple[list[str], Ints]:
    """The corpus's buckets, sorted, and the samples of each in each unit [units, buckets], from the
    unit table.
    """
    column = corpus.units.column("buckets").combine_chunks()
    flat = column.flatten()
    if len(flat) == 0:
        raise InputError(
            f"{corpus.folder.location}: the corpus has captions but no images, nothing can be "
            "trained on it"
        )
    names = flat.field("bucket").to_numpy(zero_copy_only=False).astype(str)
    buckets, index = np.unique(names, return_inverse=True)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    counts = np.zeros((len(column), len(buckets)), np.int64)
    counts[np.repeat(np.arange(len(column)), lengths), index] = flat.field("samples").to_numpy(
        zero_copy_only=False
    )
    return [str(name) for name in buckets], counts
