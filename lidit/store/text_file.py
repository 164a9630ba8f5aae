"""One unit's file in memory: where each row's values lie, as tensors over the mapped bytes.

Legend: N tokens of one record batch, W width.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from lidit.errors import InputError
from lidit.store.packing import TORCH_TYPES, decode
from lidit.store.schema import read_metadata


def list_values(
    content: mmap.mmap | bytearray, base: int, column: pa.LargeListArray, dtype: torch.dtype, where: str
) -> tuple[np.ndarray, torch.Tensor]:
    """Offsets [rows + 1] and flat values of a large_list column, as views of the file's bytes."""
    offsets = column.offsets.to_numpy(zero_copy_only=True)
    values = column.values
    if values.null_count or column.null_count:
        raise InputError(f"{where}: holds nulls; run lidit verify")
    start, stop = int(offsets[0]), int(offsets[-1])
    if start != 0 or stop > len(values) or (np.diff(offsets) < 0).any():
        raise InputError(f"{where}: damaged offsets; run lidit verify")
    if not len(values):
        return offsets, torch.zeros(0, dtype=dtype)
    buffer = values.buffers()[1]
    position = buffer.address - base + values.offset * dtype.itemsize
    if not 0 <= position <= len(content) - len(values) * dtype.itemsize:
        raise InputError(f"{where}: compressed buffers; only files written by this package can be mapped")
    return offsets, torch.frombuffer(content, dtype=dtype, count=len(values), offset=position)


def record_batches(content: mmap.mmap | bytearray) -> tuple[int, list[pa.RecordBatch], pa.Schema]:
    """Base address of the bytes, the record batches lying in them, and the schema."""
    buffer = pa.py_buffer(content)
    reader = pa.ipc.open_file(buffer)
    return buffer.address, [reader.get_batch(i) for i in range(reader.num_record_batches)], reader.schema


@dataclass
class _Batch:
    first_row: int
    offsets: np.ndarray  # [rows + 1], in values
    values: torch.Tensor  # [N, W], stored type
    scale: torch.Tensor | None  # [N], int8 only
    token_ids: pa.ListArray
    pooled: torch.Tensor | None  # [rows, X], in families with pooled vectors


class TextFile:
    """One unit of a text family."""

    def __init__(self, batches: list[_Batch], storage: str, width: int, lengths: np.ndarray) -> None:
        self.batches, self.storage, self.width, self.lengths = batches, storage, width, lengths
        self.rows = len(lengths)
        self._first_rows = np.asarray([batch.first_row for batch in batches], dtype=np.int64)

    @classmethod
    def load(cls, content: mmap.mmap | bytearray, where: str) -> TextFile:
        """Raises pa.ArrowInvalid or InputError for anything but a whole file of a text family."""
        base, arrow_batches, schema = record_batches(content)
        facts = read_metadata(schema, where)
        storage, width = facts["storage"], facts["width"]
        batches, lengths, first_row = [], [np.zeros(0, np.int64)], 0
        for batch in arrow_batches:
            tokens = batch.column("tokens").to_numpy(zero_copy_only=False).astype(np.int64)
            offsets, flat = list_values(content, base, batch.column("states"), TORCH_TYPES[storage], where)
            if (np.diff(offsets) != tokens * width).any():
                raise InputError(f"{where}: states do not fit the token counts; run lidit verify")
            scale = None
            if storage == "int8":
                _, scale = list_values(content, base, batch.column("scale"), torch.float32, where)
                if len(scale) != tokens.sum():
                    raise InputError(f"{where}: scales do not fit the token counts; run lidit verify")
            pooled = _pooled(content, base, batch, where)
            values = flat.view(-1, width)
            batches.append(_Batch(first_row, offsets // width, values, scale, batch.column("token_ids"), pooled))
            lengths.append(tokens)
            first_row += batch.num_rows
        return cls(batches, storage, width, np.concatenate(lengths))

    def states(self, rows: Sequence[int] | None, mean: torch.Tensor, deviation: torch.Tensor) -> list[torch.Tensor]:
        if rows is None and self.storage != "int8":
            return [
                state
                for batch in self.batches
                for state in decode(batch.values, self.storage, batch.scale, mean, deviation).split(
                    np.diff(batch.offsets).tolist()
                )
            ]
        found = []
        # int8 row by row: what is computed for one caption stays in the processor's cache.
        for row in range(self.rows) if rows is None else rows:
            batch, local = self._locate(row)
            part = slice(int(batch.offsets[local]), int(batch.offsets[local + 1]))
            scale = None if batch.scale is None else batch.scale[part]
            found.append(decode(batch.values[part], self.storage, scale, mean, deviation))
        return found

    def pooled(self, rows: Sequence[int] | None) -> list[torch.Tensor] | None:
        """[X] of each row; None where the family has no pooled vectors."""
        found = []
        for row in range(self.rows) if rows is None else rows:
            batch, local = self._locate(row)
            if batch.pooled is None:
                return None
            found.append(batch.pooled[local])
        return found

    def token_ids(self, rows: Sequence[int] | None) -> list[list[int]]:
        found = []
        for row in range(self.rows) if rows is None else rows:
            batch, local = self._locate(row)
            found.append(batch.token_ids[local].as_py())
        return found

    def _locate(self, row: int) -> tuple[_Batch, int]:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of a unit with {self.rows} rows")
        batch = self.batches[int(np.searchsorted(self._first_rows, row, side="right")) - 1]
        return batch, row - batch.first_row


def _pooled(content: mmap.mmap | bytearray, base: int, batch: pa.RecordBatch, where: str) -> torch.Tensor | None:
    if "pooled" not in batch.schema.names:
        return None
    offsets, flat = list_values(content, base, batch.column("pooled"), torch.float32, where)
    if len(set(np.diff(offsets).tolist())) > 1:
        raise InputError(f"{where}: pooled vectors of several widths; run lidit verify")
    return flat.view(batch.num_rows, -1) if batch.num_rows else flat.view(0, 0)
