"""ZeRO-3 from the first tensor on: weights are on rank 0 alone before every rank has its share of
them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lidit.config import EngineSettings


def is_partitioned(engine: EngineSettings) -> bool:
    """Whether `partition_from_rank_zero` is this engine's way to its weights: other ranks' models
    may be on meta.

    Not with weights on NVMe, for which DeepSpeed must make its own files.
    """
    return engine.zero_stage == 3 and engine.offload_parameters != "nvme"


@torch.no_grad()
def partition_from_rank_zero(
    model: nn.Module, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> None:
    """Give every rank its share of each parameter of rank 0's `model`, one parameter after the
    other. Collective.

    DeepSpeed alone would first move the whole model to every GPU: 21 GB of the 10B model in
    bfloat16, after a whole float32 copy in the memory of every process. So a rank holds one whole
    parameter at a time.

    Args:
        model: The same network on every rank; with numbers on rank 0, elsewhere with or without.
        config: DeepSpeed's.
        device: This worker's.
        dtype: Of the weights that compute.
    """
    import deepspeed

    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # what rank 0 sends takes its place
                room = torch.empty(parameter.shape, dtype=dtype, device=device)
                parameter = nn.Parameter(room, requires_grad=parameter.requires_grad)
                setattr(module, name, parameter)
            else:
                parameter.data = parameter.data.to(device, dtype)
            zero._convert_to_zero_parameters([parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            numbers = (
                torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            )
            dist.broadcast(numbers, 0)
            module._buffers[name] = numbers
