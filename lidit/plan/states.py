"""Store, code or roll: what a run's text states cost in each of the three ways, and which way is
the cheapest.

Store: every caption is encoded once and its states are kept. Code: the same in fewer bits. Roll:
units are computed shortly before training needs them and deleted afterwards, anew in every epoch. A
unit is always computed whole, so that its bytes depend on nothing else, so rolling also encodes the
captions that an epoch does not draw.

Nothing here reads a file. Money is in the unit of `plan.price_per_gpu_hour`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Bits per value, what a storage adds per token apart. coded: at an error of .1, entropy coder and
# index included; int4: 4 bits and a 16-bit scale for every 64 channels.
STATE_BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "int4": 4.25, "coded": 3.2}
CODED = ("int4", "coded")
# on disk besides those ahead: the window in use and what a batch at its border left over
ROLLING_WINDOWS = 2
WORTH_CODING = 0.02  # of the run's cost: below that share, fewer bits save too little to be advised

Way = Literal["store", "code", "roll"]


def text_bytes(
    captions: int,
    tokens: float,
    width: int,
    storage: str,
    pooled: int = 0,
    bits: float | None = None,
) -> float:
    """Bytes of a text family's unit files: states, token ids and offsets of captions with `tokens`
    each on average, and their pooled vectors in float32.

    bits: per value, where they were measured; None takes `STATE_BITS`.
    """
    scale = 4 if storage == "int8" else 0
    row = 4 + 4 + 8 + (8 if scale else 0)  # tokens, offsets of token_ids, states and scale
    row += 8 + 4 * pooled if pooled else 0
    state = width * (STATE_BITS[storage] if bits is None else bits) / 8
    return captions * (tokens * (state + 4 + scale) + row)


@dataclass(frozen=True)
class Run:
    """The quantities of a run that decide where its states should live.

    embed_cost: of encoding every caption once. train_cost: of the training itself. sizes: storage
    -> bytes of all families. storage: the recipe's. window: share of the corpus in one window.
    unit_seconds: of one encoder GPU;
    window_seconds: of training on one window.
    """

    epochs: float
    embed_cost: float
    train_cost: float
    sizes: Mapping[str, float]
    storage: str
    window: float
    ahead: int
    keep: float
    months: float
    price_per_terabyte_month: float
    unit_seconds: float
    window_seconds: float


@dataclass(frozen=True)
class StatesPlan:
    """Where the states should live.

    passes: over the captions, as rolling computes them. terabytes, monthly, totals: per storage;
    totals are encoding once and `plan.months` of storage. roll_total, roll_terabytes: of a rolling
    family at the recipe's storage.
    gigabytes_per_second: text states that one node reads, per storage. encoders_per_trainer: GPUs.
    ahead: windows that hide how long a unit takes.
    """

    passes: float
    terabytes: dict[str, float]
    monthly: dict[str, float]
    totals: dict[str, float]
    roll_terabytes: float
    roll_total: float
    encoders_per_trainer: float
    ahead: int
    gigabytes_per_second: dict[str, float]
    way: Way
    advice: str


def rolling_passes(epochs: float, keep: float) -> float:
    """How often rolling encodes the corpus: the kept share once, everything else in every epoch."""
    return keep * min(epochs, 1.0) + (1 - keep) * epochs


def windows_ahead(unit_seconds: float, window_seconds: float) -> int:
    """Windows that encoders must be ahead: a unit is started so early that it is there when its
    window begins.

    One window more, because the units of a window come into sight together, and one because they
    end together.
    """
    return math.ceil(unit_seconds / window_seconds) + 2


def encoders_per_trainer(embed_seconds_per_sample: float, train_seconds_per_sample: float) -> float:
    """Encoder GPUs that keep one training GPU supplied, from the GPU seconds of one sample on
    either side.
    """
    return embed_seconds_per_sample / train_seconds_per_sample


def plan_states(run: Run, encoders: float, gigabytes_per_second: dict[str, float]) -> StatesPlan:
    """Compare the three ways.

    encoders: GPUs per trainer GPU without kept units. gigabytes_per_second: of one node, per
    storage.
    """
    terabytes = {name: size / 1e12 for name, size in run.sizes.items()}
    monthly = {name: size * run.price_per_terabyte_month for name, size in terabytes.items()}
    totals = {name: run.embed_cost + price * run.months for name, price in monthly.items()}

    # A rolling family holds some windows and the kept share, and encodes again what it deleted.
    held = min(
        1.0, run.keep + (1 - run.keep) * min(1.0, (run.ahead + ROLLING_WINDOWS) * run.window)
    )
    passes = rolling_passes(run.epochs, run.keep)
    roll_terabytes = held * terabytes[run.storage]
    roll_total = (
        passes * run.embed_cost + roll_terabytes * run.price_per_terabyte_month * run.months
    )

    way, advice = _advice(run, terabytes, totals, roll_total, encoders)
    return StatesPlan(
        passes=passes,
        terabytes=terabytes,
        monthly=monthly,
        totals=totals,
        roll_terabytes=roll_terabytes,
        roll_total=roll_total,
        encoders_per_trainer=encoders * (1 - run.keep),
        ahead=windows_ahead(run.unit_seconds, run.window_seconds),
        gigabytes_per_second=gigabytes_per_second,
        way=way,
        advice=advice,
    )


def _advice(
    run: Run,
    terabytes: Mapping[str, float],
    totals: Mapping[str, float],
    roll: float,
    encoders: float,
) -> tuple[Way, str]:
    """The cheapest way, in one sentence with the numbers that decide."""
    coded = min(CODED, key=lambda name: totals[name])
    store, code = totals[run.storage], totals[coded]
    time = "a month" if run.months == 1 else f"{run.months:g} months"
    if roll < min(store, code):
        cheaper = min((store, run.storage), (code, coded))[1]
        return "roll", (
            f"roll: {run.epochs:.1f} passes of encoding cost {roll:,.0f}, storing {cheaper} for "
            f"{time} "
            f"{totals[cheaper]:,.0f}; {encoders:.2g} encoder GPUs supply one training GPU"
        )
    little = store - code < WORTH_CODING * (run.train_cost + store)
    if run.storage in CODED or (little and store <= roll):
        return "store", (
            f"store: {run.storage} is {terabytes[run.storage]:,.2f} TB and costs {store:,.0f} "
            f"with {time} of storage, "
            f"rolling would cost {roll:,.0f}, and {coded} would save {max(store - code, 0):,.0f}"
        )
    return "code", (
        f"code: {coded} is {terabytes[coded]:,.2f} TB and costs {code:,.0f} with {time} of "
        f"storage, {run.storage} "
        f"{store:,.0f}, and rolling would cost {roll:,.0f}"
    )
