"""From staged sources to numbered units: duplicate keys resolved over the whole corpus, then units
written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lidit.sources.staging import StagedSource, staged_name
from lidit.store import ImageReference, Refusal, Sample, publish_unit, unit_tables
from lidit.store.files.atomic import FileDigest, publish_table
from lidit.store.files.folder import Folder
from lidit.store.samples import quarantine_table
from lidit.store.schema import unit_digits

# Keys compared at once: bounds the driver's memory to about a gigabyte whatever the corpus holds.
KEYS_AT_ONCE = 20_000_000
QUARANTINE = "quarantine"


@dataclass(frozen=True)
class SourceListing:
    """One source file's part of the corpus: its units, of `unit_samples` samples each but the last.

    digits: of every unit's name; duplicates: staged row -> the source file that has the row's key
    first.
    """

    index: int
    name: str
    first_unit: int
    units: int
    unit_samples: int
    digits: int
    duplicates: dict[int, str]


def find_duplicates(
    folder: Folder, staged: Sequence[StagedSource], keys_at_once: int = KEYS_AT_ONCE
) -> dict[int, dict[int, str]]:
    """Source index -> {row: source file of the first sample with that key}, over all sources in
    order.

    Keys are compared by 128 bits of their sha256, in as many passes as memory asks for.
    """
    passes = max(1, -(-sum(s.samples for s in staged) // keys_at_once))
    duplicates: dict[int, dict[int, str]] = {}
    for part in range(passes):
        high, low, source, row = [], [], [], []
        for position, entry in enumerate(staged):
            hashes = _key_hashes(folder, entry)  # [samples, 2] uint64
            mine = np.flatnonzero(hashes[:, 0] % np.uint64(passes) == part)
            high.append(hashes[mine, 0])
            low.append(hashes[mine, 1])
            source.append(np.full(len(mine), position, np.int32))
            row.append(mine.astype(np.int32))
        keys = np.stack([np.concatenate(high), np.concatenate(low)])
        sources, rows = np.concatenate(source), np.concatenate(row)
        order = np.lexsort((rows, sources, keys[1], keys[0]))
        same = np.zeros(len(order), bool)
        same[1:] = (keys[:, order[1:]] == keys[:, order[:-1]]).all(0)
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        for place in np.flatnonzero(same):
            original, copy = order[first[place]], order[place]
            entry = staged[int(sources[copy])]
            duplicates.setdefault(entry.index, {})[int(rows[copy])] = staged[
                int(sources[original])
            ].name
    return duplicates


def _key_hashes(folder: Folder, staged: StagedSource) -> np.ndarray:
    column = folder.read_table(f"{staged_name(staged.index)}-samples.arrow")["key_hash"]
    halves = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint64)[
            chunk.offset * 2 : (chunk.offset + len(chunk)) * 2
        ]
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate([np.zeros(0, np.uint64), *halves]).reshape(-1, 2)


def number_units(
    staged: Sequence[StagedSource], duplicates: dict[int, dict[int, str]], unit_samples: int
) -> list[SourceListing]:
    """Consecutive unit numbers for every source file, in order; a file without a
    sample gets none.
    """
    kept = [entry.samples - len(duplicates.get(entry.index, {})) for entry in staged]
    units = [-(-samples // unit_samples) for samples in kept]
    first_units = itertools.accumulate(units, initial=0)
    digits = unit_digits(sum(units))
    return [
        SourceListing(
            entry.index,
            entry.name,
            first,
            count,
            unit_samples,
            digits,
            duplicates.get(entry.index, {}),
        )
        for entry, first, count in zip(staged, first_units, units, strict=False)
    ]


@dataclass(frozen=True)
class WrittenSource:
    """rows: of the unit table; quarantine: the file of refusals, None where there are none; joined:
    rows whose captions went to the first row of the same key and image."""

    index: int
    rows: list[dict[str, Any]]
    quarantine: FileDigest | None
    joined: int


def write_units(corpus: Folder, staging: Folder, listing: SourceListing) -> WrittenSource:
    """Write all units of one source and its quarantine file.

    Writing again gives the same bytes, so a rerun after a crash simply overwrites.
    """
    rows, unit, refusals = [], listing.first_unit, []
    chunk: list[Sample] = []
    further, joined = _further_captions(staging, listing)
    for position, sample in enumerate(_samples(staging, listing.index)):
        if position in joined:
            continue
        if position in further:
            sample = replace(sample, captions=sample.captions + further[position])
        if position in listing.duplicates:
            where = listing.duplicates[position]
            refusals.append(
                Refusal(
                    sample.key,
                    listing.name,
                    f"duplicate key: the first sample with it is in {where}",
                )
            )
            continue
        chunk.append(sample)
        if len(chunk) == listing.unit_samples:
            rows.append(
                publish_unit(corpus, unit, listing.digits, listing.name, *unit_tables(chunk))
            )
            unit, chunk = unit + 1, []
    if chunk:
        rows.append(publish_unit(corpus, unit, listing.digits, listing.name, *unit_tables(chunk)))
    refused = staging.read_table(f"{staged_name(listing.index)}-refused.arrow")
    quarantine = None
    if refused.num_rows or refusals:
        table = pa.concat_tables([refused, quarantine_table(refusals)]).combine_chunks()
        folder = corpus.child(QUARANTINE)
        folder.create()
        quarantine = publish_table(folder, f"{staged_name(listing.index)}.arrow", table)
    return WrittenSource(listing.index, rows, quarantine, len(joined))


def _further_captions(
    staging: Folder, listing: SourceListing
) -> tuple[dict[int, tuple[tuple[str, str], ...]], set[int]]:
    """Row -> captions of later rows of its key and image, as in tables of COCO; the rows that these
    are."""
    copies = {row for row, where in listing.duplicates.items() if where == listing.name}
    if not copies:
        return {}, set()
    table = staging.read_table(f"{staged_name(listing.index)}-samples.arrow")
    hashes, keys = table["key_hash"].to_pylist(), {table["key_hash"][row].as_py() for row in copies}
    first: dict[bytes, int] = {}
    further: dict[int, dict[str, str]] = {}
    joined: set[int] = set()
    for row, key in enumerate(hashes):
        if key not in keys:
            continue
        original = first.setdefault(key, row)
        image = table["image_hash"][row].as_py()
        if row == original or image is None or image != table["image_hash"][original].as_py():
            continue
        joined.add(row)
        own = {caption["text"] for caption in table["captions"][original].as_py()}
        for caption in table["captions"][row].as_py():
            if caption["text"] not in own:
                further.setdefault(original, {}).setdefault(caption["text"], caption["origin"])
    return {row: tuple(captions.items()) for row, captions in further.items()}, joined


def _samples(staging: Folder, index: int) -> Iterator[Sample]:
    table = staging.read_table(f"{staged_name(index)}-samples.arrow")
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            captions = tuple((caption["text"], caption["origin"]) for caption in row["captions"])
            image = ImageReference(**row["image"]) if row["image"] else None
            yield Sample(
                row["key"], captions, image, row["width"], row["height"], row["bucket"], row["meta"]
            )
