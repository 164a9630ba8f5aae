"""Tables of text states: one unit's captions, and the states that all captions of a family share.

Legend: T tokens of one caption, N tokens of many captions, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lidit.errors import InputError, JobError
from lidit.store.packing import ARROW_TYPES, STORAGES, decode, encode
from lidit.store.schema import read_metadata, with_metadata

SHARED_ROLES = ("prefix", "empty", "mean", "deviation")
POOLED_ROLE = "empty_pooled"  # only in families with pooled vectors


def states_schema(storage: str, width: int) -> pa.Schema:
    """Columns and metadata of one unit of a text family. InputError for an unknown storage."""
    if storage not in STORAGES:
        raise InputError(f"storage {storage!r}: choose one of {', '.join(STORAGES)}")
    fields = [
        ("tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("states", pa.large_list(ARROW_TYPES[storage])),
    ]
    if storage == "int8":
        fields.append(("scale", pa.large_list(pa.float32())))
    logical = "bfloat16" if storage == "bfloat16" else "float32"
    return with_metadata(pa.schema(fields), kind="text", storage=storage, logical=logical, width=width)


def text_table(
    token_ids: Sequence[Sequence[int]],
    states: Sequence[torch.Tensor],
    storage: str,
    width: int | None = None,
    mean: torch.Tensor | None = None,
    deviation: torch.Tensor | None = None,
) -> pa.Table:
    """Rows of a text family, ready to publish.

    states: one [T, W] floating tensor per caption, T = len(token_ids) of that caption, zero tokens allowed.
    width: needed only when there is no caption at all. mean, deviation: [W] float32, for int8.
    Raises JobError for states that are not finite or do not fit their token ids, InputError for a wrong storage.
    """
    if width is None:
        if not states:
            raise ValueError("text_table: width is needed for a table without rows")
        width = states[0].shape[-1]
    for row, (tokens, state) in enumerate(zip(token_ids, states, strict=True)):
        if state.shape != (len(tokens), width):
            raise JobError(
                f"row {row}: {len(tokens)} token ids, width {width}, but states of shape {list(state.shape)}"
            )
    states_schema(storage, width)  # a wrong storage is told before the work
    flat = torch.cat([s.detach().cpu() for s in states]) if states else torch.zeros(0, width)  # [N, W]
    # Far faster than isfinite().all(): both ends are finite exactly when everything between them is.
    if flat.numel() and not all(end.isfinite() for end in torch.aminmax(flat)):
        raise not_finite(next(row for row, state in enumerate(states) if not torch.isfinite(state).all()))
    values, scale = encode(flat, storage, mean, deviation)
    return stored_table(token_ids, values, scale, storage, width)


def not_finite(row: int) -> JobError:
    """What to say of a caption whose states are no numbers."""
    return JobError(
        f"row {row}: the encoder produced NaN or infinite states; float16 overflow is the usual cause: compute in "
        "bfloat16 or float32"
    )


def stored_table(
    token_ids: Sequence[Sequence[int]], values: torch.Tensor, scale: torch.Tensor | None, storage: str, width: int
) -> pa.Table:
    """`text_table` of states that `lidit.store.packing.encode` has packed: values [N, W], for int8 scale [N]."""
    schema = states_schema(storage, width)
    lengths = np.asarray([len(ids) for ids in token_ids], dtype=np.int64)
    ids = np.asarray([i for row in token_ids for i in row], dtype=np.int32)
    columns = [
        pa.array(lengths.astype(np.int32)),
        pa.ListArray.from_arrays(pa.array(_offsets(lengths).astype(np.int32)), pa.array(ids)),
        pa.LargeListArray.from_arrays(pa.array(_offsets(lengths) * width), pa.array(values.numpy().reshape(-1))),
    ]
    if scale is not None:
        columns.append(pa.LargeListArray.from_arrays(pa.array(_offsets(lengths)), pa.array(scale.numpy())))
    return pa.Table.from_arrays(columns, schema=schema)


def with_pooled(table: pa.Table, pooled: Sequence[torch.Tensor], width: int) -> pa.Table:
    """A text table with one pooled vector [X] per row; width: X, for a table without rows."""
    flat = torch.stack(list(pooled)).float().cpu() if pooled else torch.zeros(0, width)  # [rows, X]
    if not torch.isfinite(flat).all():
        raise JobError("the encoder produced NaN or infinite pooled vectors; compute in bfloat16 or float32")
    offsets = np.arange(len(flat) + 1, dtype=np.int64) * flat.shape[1]
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat.numpy().reshape(-1)))
    return table.append_column(pa.field("pooled", column.type), column)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True)
class StorageLoss:
    """What storing states in fewer bits has lost: sums, so that units add up.

    Error: RMS of the difference in units of each channel's deviation. Cosine: between states with the mean taken off,
    averaged over tokens.
    """

    squared_error: float
    values: int
    cosine: float
    lowest_cosine: float
    tokens: int

    def __add__(self, other: StorageLoss) -> StorageLoss:
        return StorageLoss(
            self.squared_error + other.squared_error,
            self.values + other.values,
            self.cosine + other.cosine,
            min(self.lowest_cosine, other.lowest_cosine),
            self.tokens + other.tokens,
        )

    @property
    def standardised_rms(self) -> float:
        return float((self.squared_error / max(self.values, 1)) ** 0.5)

    @property
    def centred_cosine(self) -> float:
        return self.cosine / self.tokens if self.tokens else 1.0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


NO_LOSS = StorageLoss(0.0, 0, 0.0, 1.0, 0)


def storage_loss(
    states: Sequence[torch.Tensor], table: pa.Table, mean: torch.Tensor, deviation: torch.Tensor
) -> StorageLoss:
    """What storing `states` ([T, W] each) as `table` (from `text_table`) has cost. mean, deviation: [W] float32."""
    if not table.num_rows or not sum(table["tokens"].to_pylist()):
        return NO_LOSS
    total = NO_LOSS
    stored = decode_table(table, mean, deviation)
    for original, back in zip(states, stored, strict=True):
        if not len(original):
            continue
        exact, approximate = original.detach().cpu().float() - mean, back.float() - mean  # [T, W]
        difference = ((approximate - exact) / deviation).double().square().sum()
        cosine = torch.nn.functional.cosine_similarity(exact.double(), approximate.double(), dim=-1)  # [T]
        same = (exact == approximate).all(-1)  # a state equal to the mean has no direction, and no error
        cosine = torch.where(same, 1.0, cosine)
        total += StorageLoss(float(difference), exact.numel(), float(cosine.sum()), float(cosine.min()), len(exact))
    return total


def decode_table(
    table: pa.Table, mean: torch.Tensor | None = None, deviation: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """One [T, W] tensor per row of a text table held in memory."""
    facts = read_metadata(table.schema, "table")
    storage, width = facts["storage"], facts["width"]
    values = torch.from_numpy(_flat(table["states"]).copy()).view(-1, width)  # [N, W]
    scale = torch.from_numpy(_flat(table["scale"]).copy()) if storage == "int8" else None
    lengths = table["tokens"].to_pylist()
    return list(decode(values, storage, scale, mean, deviation).split(lengths))


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    flattened = column.combine_chunks().flatten()
    return flattened.to_numpy(zero_copy_only=False)


def value_range(states: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Smallest and largest value; (0, 0) where there is none."""
    full = [s for s in states if s.numel()]
    if not full:
        return 0.0, 0.0
    return min(float(s.min()) for s in full), max(float(s.max()) for s in full)


def channel_statistics(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [W] float32 over the tokens of a calibration sample ([T, W] each), summed in float64.

    A channel that never varies gets deviation 1. Raises JobError without a single token.
    """
    tokens = sum(len(s) for s in states)
    if not tokens:
        raise JobError("the calibration sample has no token: every caption is empty")
    mean = torch.stack([s.double().sum(0) for s in states]).sum(0) / tokens  # [W]
    variance = torch.stack([(s.double() - mean).square().sum(0) for s in states]).sum(0) / tokens
    deviation = variance.sqrt().float()
    return mean.float(), torch.where(deviation > 0, deviation, 1.0)


@dataclass(frozen=True)
class SharedStates:
    """What all captions of a text family have in common.

    Args:
        prefix: [P, W] in the compute dtype: states of the instruction.
        empty: [T, W] in the compute dtype: states of the empty caption.
        mean: [W] float32, of each channel over a sample of captions.
        deviation: [W] float32, likewise.
        prefix_ids: The P token ids of the instruction.
        empty_ids: The T token ids of the empty caption.
        sha256: Of the file they came from, which every unit's record repeats.
        empty_pooled: [X] float32, the empty caption's vector in families with pooled vectors.
    """

    prefix: torch.Tensor
    empty: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    prefix_ids: tuple[int, ...]
    empty_ids: tuple[int, ...]
    sha256: str
    empty_pooled: torch.Tensor | None = None


def shared_table(
    prefix_ids: Sequence[int],
    prefix: torch.Tensor,
    empty_ids: Sequence[int],
    empty: torch.Tensor,
    mean: torch.Tensor,
    deviation: torch.Tensor,
) -> pa.Table:
    """`shared.arrow`: prefix [P, W] and empty [T, W] exactly as computed, mean and deviation [W].

    Values are float32, which holds every bfloat16 exactly, so mean and deviation keep their precision; the compute
    dtype is in the metadata. Raises JobError where a value is not finite.
    """
    compute = str(prefix.dtype).removeprefix("torch.")
    width = mean.shape[0]
    rows = {"prefix": prefix, "empty": empty, "mean": mean[None], "deviation": deviation[None]}
    for role, value in rows.items():
        if value.ndim != 2 or value.shape[1] != width or not torch.isfinite(value).all():
            raise JobError(f"{role} states: shape {list(value.shape)} at width {width}, or not finite")
    ids = [list(prefix_ids), list(empty_ids), [], []]
    columns = [
        pa.array(list(rows)),
        pa.array([len(value) for value in rows.values()], pa.int32()),
        pa.array(ids, pa.list_(pa.int32())),
        pa.array([v.detach().cpu().float().reshape(-1).numpy() for v in rows.values()], pa.large_list(pa.float32())),
    ]
    schema = pa.schema(
        [
            ("role", pa.string()),
            ("tokens", pa.int32()),
            ("token_ids", pa.list_(pa.int32())),
            ("states", pa.large_list(pa.float32())),
        ]
    )
    facts = with_metadata(schema, kind="shared", storage="float32", logical=compute, width=width)
    return pa.Table.from_arrays(columns, schema=facts)


def with_empty_pooled(shared: pa.Table, pooled: torch.Tensor) -> pa.Table:
    """`shared.arrow` of a family with pooled vectors: the empty caption's, [X]."""
    row: tuple[list[Any], ...] = [POOLED_ROLE], [0], [[]], [pooled.float().cpu().tolist()]
    added = pa.table(
        [pa.array(value, field.type) for value, field in zip(row, shared.schema, strict=True)], shared.schema
    )
    return pa.concat_tables([shared, added]).combine_chunks()


def read_shared(table: pa.Table, sha256: str, where: str) -> SharedStates:
    """The inverse of `shared_table`. InputError where a role is missing."""
    facts = read_metadata(table.schema, where)
    width, compute = facts["width"], getattr(torch, facts["logical"])
    rows = {role: i for i, role in enumerate(table["role"].to_pylist())}
    if set(rows) - {POOLED_ROLE} != set(SHARED_ROLES):
        raise InputError(f"{where}: roles {sorted(rows)}, expected {sorted(SHARED_ROLES)}")

    def tensor(role: str) -> torch.Tensor:
        values = table["states"][rows[role]].values.to_numpy(zero_copy_only=False)
        return torch.from_numpy(values.copy()).view(-1, width)

    def ids(role: str) -> tuple[int, ...]:
        return tuple(table["token_ids"][rows[role]].as_py())

    pooled = table["states"][rows[POOLED_ROLE]].values.to_numpy().copy() if POOLED_ROLE in rows else None
    return SharedStates(
        tensor("prefix").to(compute),
        tensor("empty").to(compute),
        tensor("mean")[0],
        tensor("deviation")[0],
        ids("prefix"),
        ids("empty"),
        sha256,
        None if pooled is None else torch.from_numpy(pooled),
    )
