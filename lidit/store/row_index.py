"""Where each row of a text family's unit lies in its file, and its CRC32C, so that rows can be read
and checked alone.

A file of version 2 has the columns tokens, crc32c and states in this order: what stands before a
record batch's values (token counts, checksums, offsets) is one small piece. A unit's record names,
per record batch,

    [rows, places of tokens, crc32c, the states' offsets, their values and scales (0: none), CRC32C
    of the piece]

as byte positions in the file. A row's checksum is of its bytes in `states`, then of those in
`scale`.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lidit.errors import InputError
from lidit.store.packing import ARROW_TYPES, SCALE_TYPES, row_width, scales_per_token

Ints = NDArray[np.int64]
Bytes = bytes | bytearray | memoryview | mmap.mmap
Position = list[int]


def checksum(content: Bytes, before: int = 0) -> int:
    """CRC32C of bytes that follow bytes whose CRC32C is `before`."""
    if not len(content):
        return before
    view = np.frombuffer(content, np.uint8)
    view.flags.writeable = False  # the library takes no bytes that may change
    return int(google_crc32c.extend(before, view))


@dataclass(frozen=True)
class RowIndex:
    """Of each row: tokens, where its states and its scales begin and end in the file, and its
    checksum.

    All are [rows]; `crc` is None for files of version 1.
    """

    tokens: Ints
    states: tuple[Ints, Ints]
    scales: tuple[Ints, Ints]
    crc: NDArray[np.uint32] | None

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def joined(cls, parts: Sequence[RowIndex]) -> RowIndex:
        """Of the record batches of one file, in order."""
        if not parts:
            nothing = np.zeros(0, np.int64)
            return cls(nothing, (nothing, nothing), (nothing, nothing), None)
        crcs = [part.crc for part in parts if part.crc is not None]

        def both(pairs: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
            return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])

        return cls(
            np.concatenate([part.tokens for part in parts]),
            both([part.states for part in parts]),
            both([part.scales for part in parts]),
            np.concatenate(crcs) if len(crcs) == len(parts) else None,
        )


@dataclass(frozen=True)
class Layout:
    """What a family's rows look like: the same in every unit."""

    storage: str
    width: int

    def index(
        self,
        tokens: Ints,
        offsets: Ints,
        places: tuple[int, int],
        crc: NDArray[np.uint32] | None,
        where: str,
    ) -> RowIndex:
        """Of one record batch, from its token counts [rows] and its states' offsets [rows + 1].

        places: where values and scales begin. InputError where the offsets cannot be those of the
        tokens.
        """
        fits = offsets[0] == 0 and (np.diff(offsets) >= 0).all() and (tokens >= 0).all()
        item = 1
        if self.storage != "coded":
            fits = fits and (np.diff(offsets) == tokens * row_width(self.storage, self.width)).all()
            item = ARROW_TYPES[self.storage].bit_width // 8
        if not fits:
            raise InputError(f"{where}: states do not fit the token counts; run lidit verify")
        states, scales = places
        starts = np.cumsum(tokens) - tokens
        per_token = self.scale_bytes
        return RowIndex(
            tokens,
            (states + offsets[:-1] * item, states + offsets[1:] * item),
            (scales + starts * per_token, scales + (starts + tokens) * per_token),
            crc,
        )

    @property
    def scale_bytes(self) -> int:
        """Bytes of one token's scales."""
        kind = SCALE_TYPES.get(self.storage)
        return 0 if kind is None else scales_per_token(self.storage, self.width) * kind.itemsize


def positions(content: mmap.mmap | bytearray) -> list[Position] | None:
    """What a unit's record keeps of where its rows lie; None for files without
    checksums of rows.
    """
    buffer = pa.py_buffer(content)
    reader = pa.ipc.open_file(buffer)
    if "crc32c" not in reader.schema.names or "tokens" not in reader.schema.names:
        return None
    found = []
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        if not batch.num_rows:
            continue
        states = batch.column("states")
        parts = [
            batch.column("tokens").buffers()[1],
            batch.column("crc32c").buffers()[1],
            states.buffers()[1],
        ]
        tokens, crc, offsets = (part.address - buffer.address for part in parts)
        values = place(states.buffers()[-1], buffer)
        scales = (
            place(batch.column("scale").buffers()[-1], buffer)
            if "scale" in batch.schema.names
            else 0
        )
        end = offsets + _offset_bytes(states.type) * (batch.num_rows + 1)
        head = checksum(memoryview(content)[tokens:end])
        found.append([batch.num_rows, tokens, crc, offsets, values, scales, head])
    return found


def place(part: pa.Buffer | None, whole: pa.Buffer) -> int:
    """Where a buffer begins in the file's bytes; 0 for one that holds nothing."""
    return 0 if part is None or not part.size else part.address - whole.address


def head(position: Position, storage: str) -> tuple[int, int]:
    """First and last byte of the piece in front of a record batch's values."""
    rows, tokens, _, offsets, *_ = position
    return tokens, offsets + (4 if storage == "coded" else 8) * (rows + 1)


def read_head(
    position: Position, content: bytes | memoryview, layout: Layout, where: str
) -> RowIndex:
    """The index of one record batch from the bytes that `head` names. InputError where they are
    damaged.
    """
    rows, tokens, crc, offsets, values, scales, expected = position
    if checksum(content) != expected:
        raise InputError(
            f"{where}: damaged (the row index differs from its record); run lidit verify"
        )
    kind = np.dtype("<i4" if layout.storage == "coded" else "<i8")
    counts = np.frombuffer(content, "<i4", rows, 0).astype(np.int64)
    crcs = np.frombuffer(content, "<u4", rows, crc - tokens)
    ends = np.frombuffer(content, kind, rows + 1, offsets - tokens).astype(np.int64)
    return layout.index(counts, ends, (values, scales), crcs, where)


def _offset_bytes(kind: pa.DataType) -> int:
    return 4 if pa.types.is_binary(kind) else 8
