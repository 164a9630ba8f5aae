"""Memory, time and cost of a recipe, told before anything is spent."""

from lidit.plan.plan import (
    REDUCE_BUCKET,
    Facts,
    Plan,
    PlannedEncoder,
    buffer_bytes,
    make_plan,
    state_bytes,
)

__all__ = [
    "REDUCE_BUCKET",
    "Facts",
    "Plan",
    "PlannedEncoder",
    "buffer_bytes",
    "make_plan",
    "state_bytes",
]
