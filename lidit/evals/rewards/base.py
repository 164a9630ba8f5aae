"""What every reward is: a function of pictures and of what they were asked to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lidit.errors import InputError, one_line

# `prompt`, and whatever else the corpus knows of the sample whose caption it is
Record = Mapping[str, Any]
Pictures = NDArray[np.uint8]  # [N, H, W, 3]
Reward = Callable[[Pictures, Sequence[Record]], Sequence[float]]


def rewards_of(
    reward: Reward, name: str, pictures: Pictures, records: Sequence[Record]
) -> list[float]:
    """The pictures' rewards, checked: one number from 0 to 1 each. Raises InputError with the
    reward's `name`.
    """
    given = list(reward(pictures, records))
    if len(given) != len(records):
        raise InputError(
            f"{name}: {len(given)} rewards for {len(records)} pictures; return one per picture"
        )
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}: a reward is no number ({one_line(error, 100)}); return floats"
        ) from None
    for value in values:
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise InputError(
                f"{name}: the reward {value:g} is not from 0 to 1; scale it into that range"
            )
    return values
