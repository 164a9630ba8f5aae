"""Guards asked without holding up others. Whatever a guard does but answer as agreed, nothing
passes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TypeVar

from lidit.serving.guards.guard import Guard, Verdict
from pipelines.runtime.prometheus import judged
from pipelines.serving.errors import Found, blocked, unsafe_to_answer

Item = TypeVar("Item")


async def judge(guard: Guard[Item], items: Sequence[Item]) -> list[Verdict]:
    """A verdict per item. Raises ApiError 503 where the guard fails, in whatever way."""
    try:
        verdicts = await asyncio.to_thread(guard.judge, items)
        whole = len(verdicts) == len(items) and all(
            math.isfinite(verdict.score) for verdict in verdicts
        )
    except Exception:  # SafetyUnavailable as it should be, or a guard's own: nothing was judged
        whole = False
    if not whole:
        judged(guard.name, "failed", len(items))
        raise unsafe_to_answer() from None
    refused = sum(verdict.flagged for verdict in verdicts)
    judged(guard.name, "refused", refused)
    judged(guard.name, "passed", len(items) - refused)
    return verdicts


async def demand(guard: Guard[Item] | None, items: Sequence[Item], where: str) -> None:
    """Raises ApiError 400 where an item is flagged, 503 where the guard fails. `where`: "prompt" or
    "picture".
    """
    if guard is None:  # settings say that there is none
        return
    for verdict in await judge(guard, items):
        if verdict.flagged:
            raise blocked(Found(where, f"{verdict.guard}/{verdict.version}", verdict.score))
