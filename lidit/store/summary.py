"""What is in a corpus, in numbers and plots. Reads manifests and units; states only of a sample of
units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lidit.plots import label_lines, new_panels, save_figure, set_title
from lidit.store.corpus import Corpus
from lidit.store.distinct import count_distinct
from lidit.store.families import TextFamily
from lidit.store.family import Family
from lidit.store.records import CommitRecord

SAMPLED_UNITS = 16
SAMPLED_ROWS = 64
POSITIONS = 256
FIGURE_SIZE = (7, 4)


@dataclass(frozen=True)
class FamilySummary:
    """One family as it stands; for an unfinished one the sums are over its committed units."""

    kind: str
    directory: str
    complete: bool
    units: int
    rows: int
    tokens: int
    bytes: int
    storage: str
    storage_error: float | None


@dataclass(frozen=True)
class CorpusSummary:
    """captions counts the distinct captions of each unit; distinct_captions over all units, None
    above the limit.
    """

    location: str
    digest: str
    units: int
    samples: int
    captions: int
    distinct_captions: int | None
    refused: int
    refused_captions: int
    reasons: dict[str, int]
    buckets: dict[str, int]
    families: list[FamilySummary]


def summarise(corpus: Corpus, count_limit: int = 20_000_000) -> CorpusSummary:
    """Count everything. Distinct captions are counted over all units up to
    `count_limit` captions.
    """
    totals = corpus.facts["totals"]
    return CorpusSummary(
        corpus.folder.location,
        corpus.digest,
        totals["units"],
        totals["samples"],
        totals["captions"],
        count_distinct(corpus, count_limit),
        totals.get("refused", 0),
        totals.get("refused_captions", 0),
        totals.get("reasons", {}),
        _buckets(corpus),
        list(_families(corpus)),
    )


def _buckets(corpus: Corpus) -> dict[str, int]:
    """Samples of each aspect bucket, from the unit table."""
    counts: Counter[str] = Counter()
    for unit in corpus.units["buckets"]:
        for row in unit.as_py():
            if row["bucket"]:
                counts[row["bucket"]] += row["samples"]
    return dict(sorted(counts.items()))


def _families(corpus: Corpus) -> Iterator[FamilySummary]:
    for handle in (*corpus.text_families(), *corpus.latent_families()):
        storage = str(handle.spec.get("storage", ""))
        if handle.complete:
            opened = (corpus.text_family if handle.kind == "text" else corpus.latent_family)(
                handle.directory
            )
            facts: dict[str, Any] = opened.manifest
            error = facts.get("storage_error", {}).get("standardised_rms")
            units, rows, tokens, size = (
                int(facts[key]) for key in ("units", "rows", "tokens", "bytes")
            )
        else:
            folder = corpus.folder.child(handle.kind).child(handle.directory)
            names = [f"{corpus.unit_name(unit)}.json" for unit in range(corpus.num_units)]
            present = set(folder.sizes())
            read = [
                CommitRecord.from_json(folder.read_bytes(name)) for name in names if name in present
            ]
            records = [record for record in read if record]
            units, rows = len(records), sum(record.rows for record in records)
            tokens, size = (
                sum(record.tokens for record in records),
                sum(record.bytes for record in records),
            )
            error = None
        yield FamilySummary(
            handle.kind,
            handle.directory,
            handle.complete,
            units,
            rows,
            tokens,
            size,
            storage,
            error,
        )


def plot_corpus(corpus: Corpus, folder: Path) -> list[Path]:
    """PNG files: bucket sizes, and for every complete text family token lengths and state norms by
    position.

    Norms are of a fixed sample of rows. Returns the files written; a corpus without images has no
    bucket plot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    buckets = _buckets(corpus)
    if buckets:
        written.append(_plot_bars(buckets, folder / "buckets.png"))
    for handle in corpus.text_families():
        if handle.complete:
            family = corpus.text_family(handle.directory)
            written.append(_plot_lengths(family, folder / f"tokens-{family.directory}.png"))
            written.append(_plot_norms(family, folder / f"norms-{family.directory}.png"))
    return written


def _spread(family: Family) -> list[int]:
    units = family.num_units
    return sorted(
        {i * units // SAMPLED_UNITS for i in range(SAMPLED_UNITS)}
        if units > SAMPLED_UNITS
        else range(units)
    )


def token_lengths(family: TextFamily) -> np.ndarray:
    """Tokens per caption, over a fixed spread of units."""
    return np.asarray(
        [length for unit in _spread(family) for length in family.lengths(unit)], dtype=np.int64
    )


def norms_by_position(family: TextFamily) -> tuple[np.ndarray, np.ndarray]:
    """Mean L2 norm of the states, raw and standardised per channel, at each caption position
    [positions].
    """
    shared = family.shared()
    raw, standardised, counts = np.zeros(POSITIONS), np.zeros(POSITIONS), np.zeros(POSITIONS)
    for unit in _spread(family):
        rows = range(min(SAMPLED_ROWS, len(family.lengths(unit))))
        for state in family.read(unit, list(rows)):
            values = state[:POSITIONS].float()
            raw[: len(values)] += values.norm(dim=-1).numpy()
            standardised[: len(values)] += (
                ((values - shared.mean) / shared.deviation).norm(dim=-1).numpy()
            )
            counts[: len(values)] += 1
    filled = counts > 0
    return raw[filled] / counts[filled], standardised[filled] / counts[filled]


def _plot_bars(buckets: dict[str, int], path: Path) -> Path:
    figure, (axes,) = new_panels(FIGURE_SIZE)
    names = sorted(buckets, key=lambda name: tuple(map(int, name.split("x"))))
    axes.bar(names, [buckets[name] for name in names])
    axes.set(xlabel="width x height", ylabel="samples")
    set_title(axes, "Samples per aspect bucket")
    axes.tick_params(axis="x", rotation=60)
    save_figure(figure, path)
    return path


def _plot_lengths(family: TextFamily, path: Path) -> Path:
    figure, (axes,) = new_panels(FIGURE_SIZE)
    lengths = token_lengths(family)
    longest = max(int(lengths.max(initial=1)), 1)
    # Each number of tokens has its own bar.
    edges = np.arange(int(lengths.min(initial=longest)), longest + 2) - 0.5
    axes.hist(lengths, bins=edges.tolist())
    axes.set(xlabel="tokens", ylabel="captions")
    set_title(axes, f"{family.directory}: tokens per caption")
    save_figure(figure, path)
    return path


def _plot_norms(family: TextFamily, path: Path) -> Path:
    figure, (axes,) = new_panels(FIGURE_SIZE)
    raw, standardised = norms_by_position(family)
    axes.plot(raw, label="as computed")
    axes.plot(standardised, label="standardised per channel")
    axes.set(xlabel="caption token", ylabel="mean L2 norm")
    set_title(axes, f"{family.directory}: state norm by position")
    axes.set_yscale("log")
    label_lines(axes)
    save_figure(figure, path)
    return path
