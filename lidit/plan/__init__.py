"""Memory, time and cost of a recipe, told before anything is spent."""

from lidit.plan.memory import GPU_SHARE, REDUCE_BUCKET, buffer_bytes, state_bytes
from lidit.plan.plan import Plan, make_plan
from lidit.plan.subject import Facts, PlannedEncoder

__all__ = [
    "GPU_SHARE",
    "REDUCE_BUCKET",
    "Facts",
    "Plan",
    "PlannedEncoder",
    "buffer_bytes",
    "make_plan",
    "state_bytes",
]
