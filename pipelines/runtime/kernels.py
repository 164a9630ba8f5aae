"""Which kernels a GPU process takes."""

from __future__ import annotations

import torch


def use_tensor_cores() -> None:
    """Let float32 products run in TF32; call once in every process with a GPU.

    A guided sampling step of the 1B shape took 268 ms on an H100 without and 82 ms with it
    (benchmarks/README.md). Weights, sums and everything that is no product keep float32.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def avoid_plan_building() -> None:
    """Leave attention to kernels that need no plan per shape; call once in every process with a
    GPU.

    cuDNN plans each new pair of batch and caption length anew: 64 to 140 ms a call on an H100,
    seconds for the first. With captions as they come a training step took 637 ms with cuDNN's
    attention and 219 ms without; at one length it gains 4 % (benchmarks/README.md).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
