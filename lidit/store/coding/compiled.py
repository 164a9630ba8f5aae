"""`rans` compiled: the same bytes and the same integers, for where numba is installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lidit.errors import InputError
from lidit.store.coding import rans
from lidit.store.coding.rans import DAMAGED, LOWER, PRECISION, TOTAL, Model, word_view

SWITCH = "LIDIT_COMPILED"  # 0: numpy, even where numba is installed


@cache
def _compiler() -> Callable[..., Any] | None:
    """numba's compiler; None where it is not installed or not wanted."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        numba = importlib.import_module("numba")
    except ImportError:
        return None
    # Without the interpreter's lock: a feed's threads decode side by side.
    return numba.njit(nogil=True, cache=False, boundscheck=False)


def is_compiled() -> bool:
    """Whether rows are coded by compiled code here."""
    return _compiler() is not None


@cache
def _functions() -> tuple[Any, Any]:
    compiler = _compiler()
    assert compiler is not None
    return compiler(_encode), compiler(_decode)


def encode_rows(
    values: NDArray[np.int16], scale: NDArray[np.uint8], tokens: NDArray[np.int64], model: Model
) -> list[bytes]:
    """Integers [N, W] and scale bytes [N] of rows with `tokens` [R] tokens each -> the bytes of
    each row.
    """
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens)])
    if not is_compiled():
        return [
            rans.encode_row(values[start:stop], scale[start:stop], model)
            for start, stop in pairwise(ends)
        ]
    encode, _ = _functions()
    # words: one per value, one per escape, the states
    longest = int(tokens.max(initial=0)) * (model.width * 2 + 2)
    words, found = np.empty(longest, np.uint16), []
    for start, stop in pairwise(ends):
        size = encode(
            np.ascontiguousarray(values[start:stop]), scale[start:stop], words, (model.frequencies,
                                                                                 model.starts),
            model.radius,
        )  # fmt: skip
        found.append(words[len(words) - size :].astype("<u2").tobytes())
    return found


def decode_rows(
    content: NDArray[np.uint8], ends: NDArray[np.int64], tokens: NDArray[np.int64], model: Model
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """As `rans.decode_rows`."""
    if not is_compiled():
        return rans.decode_rows(content, ends, tokens, model)
    words, first = word_view(content, ends, tokens)
    total = int(tokens.sum())
    values, states = np.empty((total, model.width), np.int16), np.empty(total, np.uint32)
    _, decode = _functions()
    if not decode(words, (first, tokens), model.slots, model.radius, (values, states)):
        raise InputError(DAMAGED)
    return values, (states & np.uint32(255)).astype(np.uint8)


def _encode(values: Any, scale: Any, words: Any, tables: Any, radius: Any) -> int:
    """Fill `words` from its end; returns how many words the row takes."""
    frequencies, starts = tables
    tokens, width = values.shape
    states = np.empty(tokens, np.uint64)
    place = len(words)
    # Escaped values come last in the row, the first of them at the very end.
    for component in range(width):
        for token in range(tokens):
            if abs(np.int64(values[token, component])) > radius[component]:
                place -= 1
                words[place] = np.uint16(np.int64(values[token, component]) & 0xFFFF)
    # `place` now is where escaped values begin; they were laid down in the decoder's order, from
    # the end backwards.
    for token in range(tokens):
        states[token] = np.uint64(LOWER) + np.uint64(scale[token])
    for component in range(width - 1, -1, -1):
        reach = np.int64(radius[component])
        for token in range(tokens - 1, -1, -1):
            value = np.int64(values[token, component])
            symbol = 2 * reach + 1 if abs(value) > reach else value + reach
            frequency = np.uint64(frequencies[component, symbol])
            state = states[token]
            if state >= frequency << np.uint64(32 - PRECISION):
                place -= 1
                words[place] = np.uint16(state & np.uint64(0xFFFF))
                state >>= np.uint64(16)
            upper = state // frequency
            rest = state - upper * frequency
            states[token] = (
                (upper << np.uint64(PRECISION)) + rest + np.uint64(starts[component, symbol])
            )
    for token in range(tokens - 1, -1, -1):
        place -= 2
        words[place] = np.uint16(states[token] & np.uint64(0xFFFF))
        words[place + 1] = np.uint16(states[token] >> np.uint64(16))
    return len(words) - place


def _decode(words: Any, rows: Any, slots: Any, radius: Any, out: Any) -> bool:
    """Fill values [N, W] and states [N]; False for bytes that the encoder did not write."""
    first, tokens = rows
    values, states = out
    total = 0
    for row in range(len(tokens)):
        total += tokens[row]
    forward, backward = np.empty(len(tokens), np.int64), np.empty(len(tokens), np.int64)
    token = 0
    for row in range(len(tokens)):
        place = first[row]
        for _ in range(tokens[row]):
            states[token] = np.uint32(words[place]) | (np.uint32(words[place + 1]) << np.uint32(16))
            token += 1
            place += 2
        forward[row], backward[row] = place, first[row + 1] - 1
    last = len(words) - 1
    mask, one, bits = np.uint64(TOTAL - 1), np.uint64(1), np.uint64(PRECISION)
    # Component by component over all rows: a component's table of 16 KB stays in the processor's
    # first cache.
    for component in range(len(radius)):
        reach = np.int32(radius[component])
        escape = np.uint64(2 * reach + 1)
        table = slots[component]
        token = 0
        for row in range(len(tokens)):
            ahead = forward[row]
            for _ in range(tokens[row]):
                state = np.uint64(states[token])
                found = np.uint64(table[state & mask])
                symbol = found >> np.uint64(24)
                state = ((found & mask) + one) * (state >> bits) + ((found >> bits) & mask)
                # Without a branch, for nothing foretells which lane takes the next word.
                low = np.uint64(state < np.uint64(LOWER))
                word = np.uint64(words[min(ahead, last)]) & (np.uint64(0) - low)
                state = (state << (low << np.uint64(4))) | word
                ahead += np.int64(low)
                if symbol == escape:
                    values[token, component] = np.int16(words[max(backward[row], 0)])
                    backward[row] -= 1
                else:
                    values[token, component] = np.int16(np.int32(symbol) - reach)
                states[token] = state
                token += 1
            forward[row] = ahead
    for row in range(len(tokens)):
        if forward[row] != backward[row] + 1:
            return False
    wrong = 0
    for token in range(total):
        wrong += states[token] >> np.uint32(8) != np.uint32(LOWER >> 8)
    return wrong == 0
