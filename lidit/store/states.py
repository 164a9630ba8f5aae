"""Tables of text states: one unit's captions, and what storing them has cost.

Legend: T tokens of one caption, N tokens of many captions, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from lidit.errors import InputError, JobError
from lidit.store.coding.compiled import decode_rows, encode_rows
from lidit.store.coding.transform import StateCode
from lidit.store.packing import (
    ARROW_TYPES,
    SCALE_TYPES,
    STORAGES,
    decode,
    encode,
    row_width,
    scales_per_token,
)
from lidit.store.row_index import checksum
from lidit.store.schema import TEXT_VERSION, read_metadata, with_metadata


def states_schema(storage: str, width: int) -> pa.Schema:
    """Columns and metadata of one unit of a text family. InputError for an unknown storage."""
    if storage not in STORAGES:
        raise InputError(f"storage {storage!r}: choose one of {', '.join(STORAGES)}")
    # What a reader of single rows needs first stands before the values: see
    # `lidit.store.row_index`.
    fields = [
        ("tokens", pa.int32()),
        ("crc32c", pa.uint32()),
        ("states", pa.binary() if storage == "coded" else pa.large_list(ARROW_TYPES[storage])),
    ]
    if storage in SCALE_TYPES:
        half = SCALE_TYPES[storage] == torch.float16
        fields.append(("scale", pa.large_list(pa.float16() if half else pa.float32())))
    fields.append(("token_ids", pa.list_(pa.int32())))
    logical = "bfloat16" if storage == "bfloat16" else "float32"
    facts = {
        "kind": "text",
        "storage": storage,
        "logical": logical,
        "width": width,
        "format": TEXT_VERSION,
    }
    return with_metadata(pa.schema(fields), **facts)


def text_table(
    token_ids: Sequence[Sequence[int]],
    states: Sequence[torch.Tensor],
    storage: str,
    width: int | None = None,
    mean: torch.Tensor | None = None,
    deviation: torch.Tensor | None = None,
) -> pa.Table:
    """Rows of a text family, ready to publish.

    states: one [T, W] floating tensor per caption, T = len(token_ids) of that caption, zero tokens
    allowed.
    width: needed only when there is no caption at all. mean, deviation: [W] float32, for int8 and
    int4. Raises JobError for states that are not finite or do not fit their token ids, InputError
    for a wrong storage.
    """
    if width is None:
        if not states:
            raise ValueError("text_table: width is needed for a table without rows")
        width = states[0].shape[-1]
    for row, (tokens, state) in enumerate(zip(token_ids, states, strict=True)):
        if state.shape != (len(tokens), width):
            raise JobError(
                f"row {row}: {len(tokens)} token ids, width {width}, but states of shape "
                f"{list(state.shape)}"
            )
    states_schema(storage, width)  # a wrong storage is told before the work
    # [N, W]
    flat = torch.cat([s.detach().cpu() for s in states]) if states else torch.zeros(0, width)
    # Far faster than isfinite().all(): both ends are finite exactly when everything between them
    # is.
    if flat.numel() and not all(end.isfinite() for end in torch.aminmax(flat)):
        raise not_finite(
            next(row for row, state in enumerate(states) if not torch.isfinite(state).all())
        )
    values, scale = encode(flat, storage, mean, deviation)
    return stored_table(token_ids, values, scale, storage, width)


def not_finite(row: int) -> JobError:
    """What to say of a caption whose states are no numbers."""
    return JobError(
        f"row {row}: the encoder produced NaN or infinite states; float16 overflow is the usual "
        "cause: compute in "
        "bfloat16 or float32"
    )


def stored_table(
    token_ids: Sequence[Sequence[int]],
    values: torch.Tensor,
    scale: torch.Tensor | None,
    storage: str,
    width: int,
    code: StateCode | None = None,
) -> pa.Table:
    """`text_table` of states that `lidit.store.packing.encode` has packed: values [N, V], scale [N]
    or [N, G].
    """
    schema = states_schema(storage, width)
    lengths = np.asarray([len(ids) for ids in token_ids], dtype=np.int64)
    ids = np.asarray([i for row in token_ids for i in row], dtype=np.int32)
    columns = {
        "tokens": pa.array(lengths.astype(np.int32)),
        "token_ids": pa.ListArray.from_arrays(
            pa.array(_offsets(lengths).astype(np.int32)), pa.array(ids)
        ),
    }
    if storage == "coded":
        assert code is not None
        assert code.model is not None
        assert scale is not None
        rows = encode_rows(values.numpy(), scale.numpy(), lengths, code.model)
        columns["states"] = pa.array(rows, pa.binary())
    else:
        per_token = row_width(storage, width)
        columns["states"] = _lists(lengths * per_token, values.numpy())
        parts = [values.numpy()]
        if scale is not None:
            columns["scale"] = _lists(lengths * scales_per_token(storage, width), scale.numpy())
            parts.append(scale.numpy())
        ends = np.cumsum(lengths)
        rows = [
            b"".join(part[stop - n : stop].tobytes() for part in parts)
            for stop, n in zip(ends, lengths)
        ]
    columns["crc32c"] = pa.array([checksum(row) for row in rows], pa.uint32())
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _lists(lengths: np.ndarray, values: np.ndarray) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(pa.array(_offsets(lengths)), pa.array(values.reshape(-1)))


def with_pooled(table: pa.Table, pooled: Sequence[torch.Tensor], width: int) -> pa.Table:
    """A text table with one pooled vector [X] per row; width: X, for a table without rows."""
    flat = torch.stack(list(pooled)).float().cpu() if pooled else torch.zeros(0, width)  # [rows, X]
    if not torch.isfinite(flat).all():
        raise JobError(
            "the encoder produced NaN or infinite pooled vectors; compute in bfloat16 or float32"
        )
    offsets = np.arange(len(flat) + 1, dtype=np.int64) * flat.shape[1]
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat.numpy().reshape(-1)))
    return table.append_column(pa.field("pooled", column.type), column)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def decode_table(
    table: pa.Table,
    mean: torch.Tensor | None = None,
    deviation: torch.Tensor | None = None,
    code: StateCode | None = None,
) -> list[torch.Tensor]:
    """One [T, W] tensor per row of a text table held in memory."""
    facts = read_metadata(table.schema, "table")
    storage, width = facts["storage"], facts["width"]
    lengths = table["tokens"].to_pylist()
    if storage == "coded":
        assert code is not None
        assert code.model is not None
        rows = table["states"].to_pylist()
        ends = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        content = np.frombuffer(b"".join(rows), np.uint8)
        scale: torch.Tensor | None
        values, scale = map(
            torch.from_numpy, decode_rows(content, ends, np.asarray(lengths, np.int64), code.model)
        )
    else:
        # [N, V]
        values = torch.from_numpy(_flat(table["states"]).copy()).view(-1, row_width(storage, width))
        scale = torch.from_numpy(_flat(table["scale"]).copy()) if storage in SCALE_TYPES else None
        scale = (
            scale.view(-1, scales_per_token(storage, width))
            if storage == "int4" and scale is not None
            else scale
        )
    return list(decode(values, storage, scale, mean, deviation, code).split(lengths))


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
    """Mean and deviation [W] float32 over the tokens of a calibration sample ([T, W] each), summed
    in float64.

    A channel that never varies gets deviation 1. Raises JobError without a single token.
    """
    tokens = sum(len(s) for s in states)
    if not tokens:
        raise JobError("the calibration sample has no token: every caption is empty")
    mean = torch.stack([s.double().sum(0) for s in states]).sum(0) / tokens  # [W]
    variance = torch.stack([(s.double() - mean).square().sum(0) for s in states]).sum(0) / tokens
    deviation = variance.sqrt().float()
    return mean.float(), torch.where(deviation > 0, deviation, 1.0)
