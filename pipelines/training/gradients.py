"""Norm and finiteness of all gradients in a handful of kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def measure_at_once(optimizer: Any) -> None:
    """Let DeepSpeed's optimizer of ZeRO 1 or 2 measure its gradients with torch's multi-tensor
    kernels.

    Its own loops take a dozen kernels for each parameter, first to find a value that is not finite,
    then for the norm: 8,000 launches in a step of LI-DiT-1B, as long as the forward pass. Such a
    value shows in the norm as well, which DeepSpeed checks before it takes the step.
    """
    from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace

    def norm(
        gradients: Iterable[torch.Tensor], _parameters: Any, norm_type: float = 2
    ) -> torch.Tensor:
        assert norm_type == 2, "gradients are clipped by their Euclidean norm"
        found = [
            gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)
        ]
        norms = torch._foreach_norm(found, 2, dtype=torch.float32)
        total = (
            torch.stack(norms).square().sum() if norms else torch.zeros((), device=optimizer.device)
        )
        dist.all_reduce(total, group=optimizer.dp_process_group)
        total = total.sqrt()
        # to -1, which stops the step
        mask_nan_or_inf_with_val_inplace(total, device=optimizer.device)
        return total

    optimizer.get_grad_norm_direct = norm
    optimizer.has_overflow = lambda partition_gradients=True: False
