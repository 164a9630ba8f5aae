"""Rows computed again: are the states that are stored those of the encoder?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lidit.store.checks.files import FileChecker
from lidit.store.checks.report import Problem
from lidit.store.coding.transform import standardise
from lidit.store.families import TextFamily

# Recomputing a row on another device or in another dtype moves it by a few hundredths of a
# deviation; the row of another caption is off by more than one.
REENCODE_TOLERANCE = 0.1
LOST = {"int4": 0.1}  # deviations that a storage itself may lose, beside coded's `storage_error`

Encode = Callable[[TextFamily, Sequence[str]], Sequence[torch.Tensor]]


def encode_again(checker: FileChecker, family: TextFamily, encode: Encode, count: int) -> None:
    """Compute `count` captions of a family again and compare the states with what is stored."""
    report = checker.report
    shared = family.shared()
    allowed = REENCODE_TOLERANCE + 2 * family.spec.get(
        "storage_error", LOST.get(str(family.spec.get("storage")), 0.0)
    )
    for unit, rows in spread_rows(family, count):
        texts = checker.corpus.captions(unit)["text"].to_pylist()
        again = encode(family, [texts[row] for row in rows])
        report.rows_encoded_again += len(rows)
        for row, stored, fresh in zip(rows, family.read(unit, rows), again, strict=True):
            where = family.folder.where(family.record(unit)["file"])
            reason = None
            if stored.shape != fresh.shape:
                reason = f"row {row}: {len(stored)} tokens stored, {len(fresh)} when computed again"
            elif len(stored):
                # As a model sees them: clamped, as the smaller storages are.
                pair = (
                    standardise(states, shared.mean, shared.deviation)
                    for states in (stored, fresh.cpu())
                )
                error = torch.sub(*pair).square().mean().sqrt().item()
                if not error < allowed:
                    reason = f"row {row}: differs by {error:.3f} deviations when computed again"
            if reason:
                remedy = (
                    "the encoder on this machine is not the one of the family, or the unit is wrong"
                )
                report.problems.append(
                    Problem(where, reason, remedy, ("text", family.directory), unit)
                )


def spread_rows(family: TextFamily, count: int) -> Iterator[tuple[int, list[int]]]:
    """The same rows every time, spread over the corpus."""
    # the rows of all units one after the other
    ends = np.cumsum(family.records["rows"].to_numpy(), dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    chosen: dict[int, list[int]] = {}
    for place in random.Random(0).sample(range(total), min(count, total)):
        unit = int(np.searchsorted(ends, place, side="right"))
        chosen.setdefault(unit, []).append(place - (int(ends[unit - 1]) if unit else 0))
    yield from sorted((unit, sorted(found)) for unit, found in chosen.items())
