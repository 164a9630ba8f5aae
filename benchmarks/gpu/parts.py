"""The parts, each with its time limit and the module that measures it, in the order
of their worth.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """`module` of this package holds the function `part_<number>`; `seconds` is what it may take on
    a GPU.
    """

    number: int
    title: str
    module: str
    seconds: float


PARTS = (
    Part(0, "attention kernels, matrix products, bandwidth", "kernels", 20),
    Part(4, "embedding", "embedding", 80),
    Part(9, "the engine's step", "engine", 120),
    Part(2, "training step", "training", 75),
    Part(1, "attention plans of new lengths", "plans", 40),
    Part(5, "sampling step", "sampling", 45),
    Part(3, "the batch's way to the GPU", "transfer", 20),
    Part(7, "codec", "codec", 25),
    Part(8, "waiting for the GPU in a step", "waits", 20),
    Part(6, "offloading", "offload", 25),
    Part(10, "stacks of small models", "small", 25),
)
