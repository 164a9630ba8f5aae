"""Memory, time and cost of a recipe, told before anything is spent."""

from lidit.plan.plan import REDUCE_BUCKET, Facts, Plan, buffer_bytes, kept_blocks, make_plan, state_bytes

__all__ = ["REDUCE_BUCKET", "Facts", "Plan", "buffer_bytes", "kept_blocks", "make_plan", "state_bytes"]
