"""What storing text states in fewer bits has cost, measured where they are computed.

Legend: T tokens of one caption, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import torch

from lidit.store.coding.transform import LIMIT, StateCode, varying
from lidit.store.schema import read_metadata
from lidit.store.states import decode_table


@dataclass(frozen=True)
class StorageLoss:
    """What storing states in fewer bits has lost: sums, so that units add up.

    Error: RMS of the difference in units of each channel's deviation. Cosine: between states with
    the mean taken off, averaged over tokens. worst: the largest error of a token, as a share of its
    own size, for int4 and coded.
    """

    squared_error: float
    values: int
    cosine: float
    lowest_cosine: float
    tokens: int
    worst: float = 0.0

    def __add__(self, other: StorageLoss) -> StorageLoss:
        return StorageLoss(
            self.squared_error + other.squared_error,
            self.values + other.values,
            self.cosine + other.cosine,
            min(self.lowest_cosine, other.lowest_cosine),
            self.tokens + other.tokens,
            max(self.worst, other.worst),
        )

    @property
    def standardised_rms(self) -> float:
        return float((self.squared_error / max(self.values, 1)) ** 0.5)

    @property
    def centred_cosine(self) -> float:
        return self.cosine / self.tokens if self.tokens else 1.0

    def to_dict(self) -> dict[str, float]:
        """The sums, as a unit's record keeps them; `worst` only where it was measured."""
        return {name: value for name, value in asdict(self).items() if name != "worst" or value}


NO_LOSS = StorageLoss(0.0, 0, 0.0, 1.0, 0)


def storage_loss(
    states: Sequence[torch.Tensor],
    table: pa.Table,
    mean: torch.Tensor,
    deviation: torch.Tensor,
    code: StateCode | None = None,
) -> StorageLoss:
    """What storing `states` ([T, W] each) as `table` (from `text_table`) has cost. mean, deviation:
    [W] float32.

    Storages that clamp as a model does (int4, coded) are compared with what the model sees.
    """
    if not table.num_rows or not sum(table["tokens"].to_pylist()):
        return NO_LOSS
    total = NO_LOSS
    clamped = read_metadata(table.schema, "table")["storage"] in ("int4", "coded")
    divisor = varying(mean, deviation) if clamped else deviation
    for original, back in zip(states, decode_table(table, mean, deviation, code), strict=True):
        if not len(original):
            continue
        exact, approximate = original.detach().cpu().float() - mean, back.float() - mean  # [T, W]
        if clamped:
            exact = torch.minimum(torch.maximum(exact, -LIMIT * divisor), LIMIT * divisor)
        off = ((approximate - exact) / divisor).double()  # [T, W]
        worst = float(
            (off.norm(dim=-1) / (exact / divisor).double().norm(dim=-1).clamp_min(1e-9)).max()
        )
        # [T]
        cosine = torch.nn.functional.cosine_similarity(exact.double(), approximate.double(), dim=-1)
        # a state equal to the mean has no direction, and no error
        same = (exact == approximate).all(-1)
        cosine = torch.where(same, 1.0, cosine)
        total += StorageLoss(
            float(off.square().sum()),
            exact.numel(),
            float(cosine.sum()),
            float(cosine.min()),
            len(exact),
            worst if clamped else 0.0,
        )
    return total
