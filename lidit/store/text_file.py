"""One unit's file: each row's values as tensors, over mapped bytes or over ranges of a file behind
a URL.

Legend: T tokens of one row, W width, V stored values of a token.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch

from lidit.errors import InputError
from lidit.store.coding.compiled import decode_rows
from lidit.store.coding.transform import CodedStates
from lidit.store.packing import SCALE_TYPES, TORCH_TYPES, decode, row_width, scales_per_token
from lidit.store.row_index import Layout, RowIndex, checksum, place
from lidit.store.schema import read_metadata
from lidit.store.shared import SharedStates


def list_values(
    content: mmap.mmap | bytearray,
    base: int,
    column: pa.LargeListArray,
    dtype: torch.dtype,
    where: str,
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
        raise InputError(
            f"{where}: compressed buffers; only files written by this package can be mapped"
        )
    return offsets, torch.frombuffer(content, dtype=dtype, count=len(values), offset=position)


def record_batches(content: mmap.mmap | bytearray) -> tuple[int, list[pa.RecordBatch], pa.Schema]:
    """Base address of the bytes, the record batches lying in them, and the schema."""
    buffer = pa.py_buffer(content)
    reader = pa.ipc.open_file(buffer)
    return (
        buffer.address,
        [reader.get_batch(i) for i in range(reader.num_record_batches)],
        reader.schema,
    )


class RowBytes(Protocol):
    """Where a file's bytes come from."""

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes from each first place up to each second one; writable, and the reader's own."""
        ...

    def forget(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Drop copies of these bytes, which are damaged. False where there is nothing but the
        original.
        """
        ...


class MappedBytes:
    """A file that lies in memory as a whole."""

    def __init__(self, content: mmap.mmap | bytearray) -> None:
        self.view = memoryview(content)

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        return [self.view[start:stop] for start, stop in ranges]

    def forget(self, ranges: Sequence[tuple[int, int]]) -> bool:
        return False


class TextFile:
    """One unit of a text family.

    remedy: what to do about a damaged row, for messages.
    """

    def __init__(
        self, layout: Layout, index: RowIndex, content: RowBytes, where: str, remedy: str = ""
    ) -> None:
        self.layout, self.index, self.content, self.where = layout, index, content, where
        self.remedy = remedy or "run lidit verify"
        self.rows, self.lengths = len(index), index.tokens
        # else a row is always checked: its bytes come from elsewhere
        self.whole = isinstance(content, MappedBytes)
        self.checked = np.zeros(self.rows, bool)
        self._batches: list[pa.RecordBatch] = []
        self._pooled: torch.Tensor | None = None

    @classmethod
    def load(cls, content: mmap.mmap | bytearray, where: str, remedy: str = "") -> TextFile:
        """Raises pa.ArrowInvalid or InputError for anything but a whole file of a text family."""
        base, batches, schema = record_batches(content)
        facts = read_metadata(schema, where)
        layout = Layout(facts["storage"], facts["width"])
        parts = [_index(content, base, batch, layout, where) for batch in batches]
        file = cls(layout, RowIndex.joined(parts), MappedBytes(content), where, remedy)
        file._batches = batches
        pooled = [
            _pooled(content, base, batch, where) for batch in batches if "pooled" in schema.names
        ]
        file._pooled = (
            torch.cat([part for part in pooled if len(part)]) if any(map(len, pooled)) else None
        )
        return file

    @property
    def has_checksums(self) -> bool:
        """Whether single rows can be checked."""
        return self.index.crc is not None

    def states(
        self, rows: Sequence[int] | None, shared: SharedStates, check: bool = False
    ) -> list[torch.Tensor]:
        """[T, W] of each row. check: refuse rows whose checksum differs; in a map each once."""
        storage = self.layout.storage
        wanted = self._known(rows)
        if storage == "coded":
            values, scale = self.coded(wanted, shared, check)
            states = decode(values, storage, scale, shared.mean, shared.deviation, shared.code)
            return list(states.split(self.lengths[wanted].tolist()))
        # Row by row: what is computed for one caption stays in the processor's cache.
        return [
            decode(*self._tensors(states, scales), shared.mean, shared.deviation)
            for states, scales in self._bytes(wanted, check)
        ]

    def coded(
        self, rows: Sequence[int], shared: SharedStates, check: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers [N, W] int16 and scales [N] uint8 of all tokens of the rows, in files of storage
        coded.
        """
        assert shared.code is not None
        assert shared.code.model is not None
        parts = [states for states, _ in self._bytes(rows, check)]
        ends = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        content = np.frombuffer(b"".join(parts), np.uint8)
        try:
            values, scale = decode_rows(content, ends, self.lengths[list(rows)], shared.code.model)
        except InputError as error:
            raise InputError(f"{self.where}: {error}; {self.remedy}") from None
        return torch.from_numpy(values), torch.from_numpy(scale)

    def int8(self, rows: Sequence[int], check: bool = False) -> list[CodedStates]:
        """Values and scales of rows as they lie in a file of storage int8, without a copy."""
        assert self.layout.storage == "int8"
        found = []
        for content in self._bytes(self._known(rows), check):
            values, _, scale = self._tensors(*content)
            assert scale is not None
            found.append(CodedStates(values, scale))
        return found

    def stored(self, row: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values and scales of a row as they are stored, but for coded rows."""
        values, _, scale = self._tensors(*self._bytes([row], False)[0])
        return values, scale

    def check(self, rows: Sequence[int]) -> None:
        """Raises InputError where a row's bytes are not those that were written."""
        self._bytes(rows, True)

    def pooled(self, rows: Sequence[int] | None) -> list[torch.Tensor] | None:
        """[X] of each row; None where the family has no pooled vectors."""
        return None if self._pooled is None else list(self._pooled[self._known(rows)])

    def token_ids(self, rows: Sequence[int] | None) -> list[list[int]]:
        ends = np.cumsum([batch.num_rows for batch in self._batches])
        found = []
        for row in self._known(rows):
            number = int(np.searchsorted(ends, row, side="right"))
            batch = self._batches[number]
            found.append(
                batch.column("token_ids")[row - int(ends[number]) + batch.num_rows].as_py()
            )
        return found

    def _known(self, rows: Sequence[int] | None) -> list[int]:
        if rows is None:
            return list(range(self.rows))
        for row in rows:
            if not 0 <= row < self.rows:
                raise IndexError(f"row {row} of a unit with {self.rows} rows")
        return list(rows)

    def _bytes(self, rows: Sequence[int], check: bool) -> list[tuple[memoryview, memoryview]]:
        """The bytes of each row's states and scales."""
        found = self._read(rows)
        if self.index.crc is None or not (check or not self.whole):
            return found
        damaged = self._differing(rows, found)
        if damaged and self.content.forget(self._ranges(damaged)):  # perhaps only a local copy is
            found = self._read(rows)
            damaged = self._differing(rows, found)
        if damaged:
            raise InputError(
                f"{self.where}: row {damaged[0]} is damaged (CRC32C differs); {self.remedy}"
            )
        self.checked[list(rows)] = True
        return found

    def _differing(
        self, rows: Sequence[int], found: Sequence[tuple[memoryview, memoryview]]
    ) -> list[int]:
        assert self.index.crc is not None
        return [
            row
            for row, (states, scales) in zip(rows, found, strict=True)
            if not (self.whole and self.checked[row])
            and checksum(scales, checksum(states)) != self.index.crc[row]
        ]

    def _read(self, rows: Sequence[int]) -> list[tuple[memoryview, memoryview]]:
        found = self.content.read(self._ranges(rows))
        return list(zip(found[: len(rows)], found[len(rows) :], strict=True))

    def _ranges(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Of all rows' states, then of all rows' scales."""
        return [
            (int(starts[row]), int(stops[row]))
            for starts, stops in (self.index.states, self.index.scales)
            for row in rows
        ]

    def _tensors(
        self, states: memoryview, scales: memoryview
    ) -> tuple[torch.Tensor, str, torch.Tensor | None]:
        """Values [T, V], their storage, and scale [T] or [T, G], without a copy."""
        storage, width = self.layout.storage, self.layout.width
        values = _view(states, TORCH_TYPES[storage]).view(-1, row_width(storage, width))
        if storage not in SCALE_TYPES:
            return values, storage, None
        scale = _view(scales, SCALE_TYPES[storage])
        return (
            values,
            storage,
            scale if storage == "int8" else scale.view(-1, scales_per_token(storage, width)),
        )


def _view(content: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(content, dtype=dtype) if len(content) else torch.zeros(0, dtype=dtype)


def _index(
    content: mmap.mmap | bytearray, base: int, batch: pa.RecordBatch, layout: Layout, where: str
) -> RowIndex:
    """Where a record batch's rows lie. InputError for nulls, damaged offsets and compressed
    buffers.
    """
    tokens = batch.column("tokens").to_numpy(zero_copy_only=False).astype(np.int64)
    crc = batch.column("crc32c").to_numpy().copy() if "crc32c" in batch.schema.names else None
    states = batch.column("states")
    if layout.storage == "coded":
        if states.null_count:
            raise InputError(f"{where}: holds nulls; run lidit verify")
        whole = pa.py_buffer(content)
        kind, (_, offsets, values) = np.dtype("<i4"), states.buffers()
        ends = (
            np.frombuffer(offsets, kind, batch.num_rows + 1).astype(np.int64)
            if batch.num_rows
            else np.zeros(1, int)
        )
        start = place(values, whole)
        if not 0 <= start <= len(content) - int(ends[-1]):
            raise InputError(
                f"{where}: compressed buffers; only files written by this package can be mapped"
            )
        return layout.index(tokens, ends, (start, 0), crc, where)
    dtype = TORCH_TYPES[layout.storage]
    offsets, flat = list_values(content, base, states, dtype, where)
    scales = 0
    if layout.storage in SCALE_TYPES:
        _, scale = list_values(
            content, base, batch.column("scale"), SCALE_TYPES[layout.storage], where
        )
        if scale.nbytes != int(tokens.sum()) * layout.scale_bytes:
            raise InputError(f"{where}: scales do not fit the token counts; run lidit verify")
        scales = _start(scale, base)
    return layout.index(tokens, offsets.astype(np.int64), (_start(flat, base), scales), crc, where)


def _start(values: torch.Tensor, base: int) -> int:
    return values.data_ptr() - base if values.numel() else 0


def _pooled(
    content: mmap.mmap | bytearray, base: int, batch: pa.RecordBatch, where: str
) -> torch.Tensor:
    offsets, flat = list_values(content, base, batch.column("pooled"), torch.float32, where)
    if len(set(np.diff(offsets).tolist())) > 1:
        raise InputError(f"{where}: pooled vectors of several widths; run lidit verify")
    return flat.view(batch.num_rows, -1) if batch.num_rows else flat.view(0, 0)
