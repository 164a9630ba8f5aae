"""Static range asymmetric numeral systems: integers in, bytes out, and the same integers back on
every machine.

One model per component, one lane per token: a lane is a 32-bit state that decodes the token's
components in order. The lanes of one row share a stream of 16-bit words; whoever falls below the
lower bound takes the next word, component by component and in each in the order of the tokens. So a
row needs no offset per token, and any row is decoded alone.

    row = state of each token (32 bits) | words (16 bits each) | escaped values (16 bits each, from
    the end backwards)

all little-endian. A lane ends as 65536 + its token's scale: the scale's byte travels for nothing,
and damage shows. This module is the reference, in numpy; `compiled` does the same a few times
faster.

Legend: R rows, N tokens of all rows, W components, S symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lidit.errors import InputError

PRECISION = 12  # bits: frequencies of a component sum to 4096
TOTAL = 1 << PRECISION
LOWER = 1 << 16  # a state is at least this, so that one word is enough to renew it
MOST_SYMBOLS = 256  # a table's entry has a byte for the symbol
DAMAGED = "not what the entropy coder wrote"


@dataclass(frozen=True)
class Model:
    """How often each symbol of each component is met.

    Args:
        frequencies: [W, S] uint16, of the values -radius ... radius of a component, then of the
            escape, then zeros;
            each row sums to 4096.
        radius: [W] int16, the largest magnitude with a symbol of its own.
    """

    frequencies: NDArray[np.uint16]
    radius: NDArray[np.int16]

    def __post_init__(self) -> None:
        symbols = 2 * self.radius.astype(np.int64) + 2
        used = np.arange(self.frequencies.shape[1]) < symbols[:, None]  # [W, S]
        fits = (
            self.frequencies.shape[1] <= MOST_SYMBOLS
            and (symbols <= self.frequencies.shape[1]).all()
        )
        whole = (self.frequencies.sum(1, dtype=np.int64) == TOTAL).all()
        if not fits or not whole or ((self.frequencies > 0) != used).any():
            raise InputError(
                "tables of an entropy coder: frequencies are positive, in 256 symbols, and "
                "sum to 4096"
            )

    @property
    def width(self) -> int:
        """Components W."""
        return len(self.radius)

    @cached_property
    def starts(self) -> NDArray[np.uint32]:
        """[W, S] sum of the frequencies before each symbol."""
        sums = np.cumsum(self.frequencies, axis=1, dtype=np.uint32)
        return np.concatenate([np.zeros((self.width, 1), np.uint32), sums[:, :-1]], axis=1)

    @cached_property
    def slots(self) -> NDArray[np.uint32]:
        """[W, 4096] what a state's low 12 bits mean: symbol << 24 | (slot - start) << 12 |
        frequency - 1.
        """
        found = np.empty((self.width, TOTAL), np.uint32)
        symbols = np.arange(self.frequencies.shape[1], dtype=np.uint32)
        for component, counts in enumerate(self.frequencies):
            symbol = np.repeat(symbols, counts)  # [4096]
            inside = np.arange(TOTAL, dtype=np.uint32) - self.starts[component][symbol]
            found[component] = (
                symbol << 24 | inside << PRECISION | (counts[symbol].astype(np.uint32) - 1)
            )
        return found


def encode_row(values: NDArray[np.int16], scale: NDArray[np.uint8], model: Model) -> bytes:
    """One row's integers [T, W] and the scale bytes [T] of its tokens as bytes."""
    tokens = len(values)
    states = LOWER + scale.astype(np.uint64)  # [T]
    reach = model.radius.astype(np.int64)
    symbols = values.astype(np.int64) + reach
    escaped = np.abs(values.astype(np.int64)) > reach
    symbols = np.where(escaped, 2 * reach + 1, symbols)  # [T, W]
    chunks: list[NDArray[np.uint16]] = []
    # Backwards: the last in is the first out. Within a component the tokens, too, for the decoder
    # takes them forwards.
    for component in range(model.width - 1, -1, -1):
        frequency = model.frequencies[component][symbols[:, component]].astype(np.uint64)  # [T]
        full = states >= frequency << np.uint64(32 - PRECISION)
        chunks.append((states[full] & np.uint64(0xFFFF)).astype(np.uint16))
        states = np.where(full, states >> np.uint64(16), states)
        start = model.starts[component][symbols[:, component]].astype(np.uint64)
        states = (states // frequency << np.uint64(PRECISION)) + states % frequency + start
    words = np.concatenate(chunks[::-1]) if tokens else np.empty(0, np.uint16)
    extra = values.T[escaped.T].astype(np.uint16)[::-1]  # read from the end backwards
    return (
        states.astype("<u4").tobytes()
        + words.astype("<u2").tobytes()
        + extra.astype("<u2").tobytes()
    )


def decode_rows(
    content: NDArray[np.uint8], ends: NDArray[np.int64], tokens: NDArray[np.int64], model: Model
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Rows lying one behind the other -> integers [N, W] and scale bytes [N].

    ends: [R + 1] where rows begin and the last one ends, in bytes; tokens: [R]. Raises InputError
    for bytes that `encode_row` did not write.
    """
    words, first = word_view(content, ends, tokens)
    total = int(tokens.sum())
    values = np.zeros((model.width, total), np.int16)
    row_of = np.repeat(np.arange(len(tokens)), tokens)  # [N]
    # [N] number of a token in its row
    lane = np.arange(total) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    place = first[:-1][row_of] + 2 * lane
    # [N]
    states = words[place].astype(np.uint32) | words[place + 1].astype(np.uint32) << np.uint32(16)
    # [R] the next word, the next escaped value
    forward, backward = first[:-1] + 2 * tokens, first[1:] - 1
    reach = model.radius.astype(np.int64)
    for component in range(model.width):
        found = model.slots[component].take(states & np.uint32(TOTAL - 1))  # [N]
        symbol = (found >> np.uint32(24)).astype(np.int16)
        values[component] = symbol - np.int16(reach[component])
        states = ((found & np.uint32(TOTAL - 1)) + np.uint32(1)) * (states >> np.uint32(PRECISION))
        states += (found >> np.uint32(PRECISION)) & np.uint32(TOTAL - 1)
        low = np.flatnonzero(states < LOWER)
        position, forward = _next(row_of[low], forward, 1)
        states[low] = states[low] << np.uint32(16) | words.take(position, mode="clip")
        escaped = np.flatnonzero(symbol == 2 * reach[component] + 1)
        if len(escaped):
            position, backward = _next(row_of[escaped], backward, -1)
            values[component][escaped] = words.take(position, mode="clip").astype(np.int16)
    if (forward != backward + 1).any() or (states >> np.uint32(8) != LOWER >> 8).any():
        raise InputError(DAMAGED)
    return values.T, (states & np.uint32(255)).astype(np.uint8)


def word_view(
    content: NDArray[np.uint8], ends: NDArray[np.int64], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """The bytes as 16-bit words, and where rows begin among them. InputError where they cannot be
    rows.
    """
    sizes = np.diff(ends)
    if (
        (sizes < 4 * tokens).any()
        or (sizes % 2).any()
        or (ends % 2).any()
        or ends[-1] > len(content)
    ):
        raise InputError(DAMAGED)
    return content[: len(content) // 2 * 2].view("<u2"), ends // 2


def _next(
    rows: NDArray[np.int64], pointer: NDArray[np.int64], step: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the words that lanes of `rows` (sorted) take, and the pointers of all rows after
    that.
    """
    taken = np.bincount(rows, minlength=len(pointer))
    before = np.cumsum(taken) - taken
    return pointer[rows] + step * (np.arange(len(rows)) - before[rows]), pointer + step * taken
