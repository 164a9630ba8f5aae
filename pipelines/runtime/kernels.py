"""Which kernels a GPU process takes for attention."""

from __future__ import annotations

import torch


def avoid_plan_building() -> None:
    """Leave attention to kernels that need no plan per shape; call once in every process with a
    GPU.

    cuDNN plans each new pair of batch and caption length anew: 64 to 140 ms a call on an H100,
    seconds for the first. With captions as they come a training step took 637 ms with cuDNN's
    attention and 219 ms without; at one length it gains 4 % (benchmarks/README.md).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
