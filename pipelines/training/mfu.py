"""Model FLOPs utilisation (MFU): the arithmetic the model needs, as a share of what the device can
do in that time.

A multiply-add counts as two FLOPs, a step as three forward passes; what is computed twice to save
memory counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

# Dense bf16 peak, FLOP/s, of the data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


class Flops(NamedTuple):
    """FLOPs of a step on one worker: what captions and images need, and what is computed with the
    padding.
    """

    useful: float
    computed: float

    def plus(self, other: Flops) -> Flops:
        return Flops(self.useful + other.useful, self.computed + other.computed)


def peak_flops(device_name: str) -> float | None:
    """Peak of the GPU that calls itself `device_name`; None for a GPU without a line
    in the table.
    """
    return next((peak for key, peak in PEAK_FLOPS.items() if key in device_name), None)


def step_flops(forward: Callable[[], None], samples: int) -> float:
    """FLOPs of one training step on `samples` samples, by torch's counter on one sample's
    `forward`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # Uncompiled: what torch first meets under the counter it would never compile afterwards.
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False) as counter,
    ):
        forward()
    return 3.0 * counter.get_total_flops() * samples


def utilisation(flops: float, seconds: float, device: torch.device) -> float | None:
    """Share of the peak of `device`, 0 to 1, at `flops` in `seconds`; None where the peak is not
    known.
    """
    if device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name())
    return None if peak is None else flops / seconds / peak
