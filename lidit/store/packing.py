"""How text states are packed into their storage dtype: float32, bfloat16 (as uint16 bits) or int8.

int8: every channel is standardised with the family's mean and deviation, then each token gets one scale,
max |z| / 127. Without the standardisation a few channels in the hundreds would eat the eight bits.

Legend: N tokens of many captions, W width.
"""

from __future__ import annotations

import pyarrow as pa
import torch

from lidit.errors import InputError

STORAGES = ("float32", "bfloat16", "int8")
ARROW_TYPES = {"float32": pa.float32(), "bfloat16": pa.uint16(), "int8": pa.int8()}
TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.uint16, "int8": torch.int8}
# Tokens at once: on a CPU what is computed between two blocks stays in its cache, on a GPU launches are few.
_BLOCKS = {"cpu": 512, "cuda": 8192}


def encode(
    flat: torch.Tensor, storage: str, mean: torch.Tensor | None, deviation: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[N, W] states -> stored values [N, W] and, for int8, scale [N]; all on the states' device."""
    if storage == "float32":
        return flat.to(torch.float32).contiguous(), None
    if storage == "bfloat16":
        return flat.to(torch.bfloat16).contiguous().view(torch.uint16), None
    values = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)  # [N, W]
    scale = torch.empty(flat.shape[0], device=flat.device)  # [N]
    size = _BLOCKS[flat.device.type]
    for start in range(0, len(flat), size):
        block = slice(start, start + size)
        standardised = flat[block].float().sub(_need(mean)).div_(_need(deviation))  # [block, W]
        scale[block] = torch.maximum(standardised.amax(-1), -standardised.amin(-1)).div_(127)
        divisor = torch.where(scale[block] > 0, scale[block], 1.0)[:, None]
        values[block] = standardised.div_(divisor).round_().to(torch.int8)
    return values, scale


def decode(
    values: torch.Tensor,
    storage: str,
    scale: torch.Tensor | None,
    mean: torch.Tensor | None,
    deviation: torch.Tensor | None,
) -> torch.Tensor:
    """Stored values [N, W] -> states [N, W] in the logical dtype; a view of `values` except for int8."""
    if storage == "float32":
        return values
    if storage == "bfloat16":
        return values.view(torch.bfloat16)
    assert scale is not None
    return torch.addcmul(_need(mean), values.float().mul_(scale[:, None]), _need(deviation))


def _need(statistic: torch.Tensor | None) -> torch.Tensor:
    if statistic is None:
        raise InputError("storage int8 needs the family's mean and deviation: publish the shared states first")
    return statistic
