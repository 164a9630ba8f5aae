"""How text states are packed: float32, bfloat16 (as uint16 bits), int8, int4, or whole steps of a
family's own code.

int8 and int4 standardise every channel with the family's mean and deviation; without that a few
channels in the hundreds would eat the bits. int8 has one scale per token, max |z| / 127. int4 has
one per token and 64 channels, chosen for the least squared error, of values clamped as a model
clamps them. coded: see `lidit.store.coding`.

Legend: N tokens of many captions, W width, G groups of 64 channels.
"""

from __future__ import annotations

from typing import TypeVar

import pyarrow as pa
import torch

from lidit.errors import InputError
from lidit.store.coding.transform import StateCode, quantise, restore, standardise, varying

Thing = TypeVar("Thing")

STORAGES = ("float32", "bfloat16", "int8", "int4", "coded")
ARROW_TYPES = {
    "float32": pa.float32(),
    "bfloat16": pa.uint16(),
    "int8": pa.int8(),
    "int4": pa.uint8(),
}
TORCH_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.uint16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "coded": torch.int16,
}
# What a token carries beside its values, in the file's column `scale`; a coded token's is inside
# its bytes.
SCALE_TYPES = {"int8": torch.float32, "int4": torch.float16}
GROUP = 64
MOST_4_BITS = 7
# Of a group's largest magnitude, where the best scale is looked for: below, more is clamped than is
# gained.
_SHRINKAGE = tuple(share / 16 for share in range(8, 18))
# Tokens at once: on a CPU what is computed between two blocks stays in its cache, on a GPU launches
# are few.
_BLOCKS = {"cpu": 512, "cuda": 8192}


def row_width(storage: str, width: int) -> int:
    """Stored values of one token."""
    return -(-width // 2) if storage == "int4" else width


def scales_per_token(storage: str, width: int) -> int:
    """Values of the column `scale` for one token."""
    return {"int8": 1, "int4": -(-width // GROUP)}.get(storage, 0)


def encode(
    flat: torch.Tensor,
    storage: str,
    mean: torch.Tensor | None,
    deviation: torch.Tensor | None,
    code: StateCode | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[N, W] states -> stored values [N, V] and scale: [N] for int8 and coded, [N, G] for int4,
    else None.

    All on the states' device. code: for coded, on that device too.
    """
    if storage == "float32":
        return flat.to(torch.float32).contiguous(), None
    if storage == "bfloat16":
        return flat.to(torch.bfloat16).contiguous().view(torch.uint16), None
    mean, deviation = _need(mean, storage), _need(deviation, storage)
    packed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in flat.split(_BLOCKS[flat.device.type]):
        if storage == "int8":
            packed.append(_encode_int8(block.float().sub(mean).div_(deviation)))
        elif storage == "int4":
            packed.append(_encode_int4(standardise(block, mean, deviation)))
        else:
            packed.append(quantise(standardise(block, mean, deviation), _need(code, storage)))
    if len(packed) == 1:
        return packed[0]
    return torch.cat([values for values, _ in packed]), torch.cat([scale for _, scale in packed])


def _encode_int8(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.maximum(z.amax(-1), -z.amin(-1)).div_(127)  # [N]
    divisor = torch.where(scale > 0, scale, 1.0)[:, None]
    return z.div_(divisor).round_().to(torch.int8), scale


def _encode_int4(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """z [N, W] -> two channels per byte, the first in the low four bits, and scale
    [N, G] float16.
    """
    width = z.shape[1]
    # [N, G, 64]
    grouped = torch.nn.functional.pad(z, (0, -width % GROUP)).unflatten(1, (-1, GROUP))
    largest = grouped.abs().amax(-1) / MOST_4_BITS  # [N, G]
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for share in _SHRINKAGE:
        scale = (largest * share).half().float()  # as it is stored
        # [N, G]
        off = (_whole_4_bits(grouped, scale) * scale[..., None] - grouped).square_().sum(-1)
        best = torch.where(off < least, scale, best)
        least = torch.minimum(off, least)
    # [N, W] of 1 ... 15
    values = _whole_4_bits(grouped, best).flatten(1)[:, :width].to(torch.int16) + 8
    values = torch.nn.functional.pad(values, (0, width % 2), value=8)
    return (values[:, 0::2] | values[:, 1::2] << 4).to(torch.uint8), best.half()


def _whole_4_bits(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    divisor = torch.where(scale > 0, scale, 1.0)[..., None]
    return (grouped / divisor).round_().clamp_(-MOST_4_BITS, MOST_4_BITS)


def decode(
    values: torch.Tensor,
    storage: str,
    scale: torch.Tensor | None,
    mean: torch.Tensor | None,
    deviation: torch.Tensor | None,
    code: StateCode | None = None,
) -> torch.Tensor:
    """Stored values [N, V] -> states [N, W] in the logical dtype; a view of `values` for the
    floating storages.
    """
    if storage == "float32":
        return values
    if storage == "bfloat16":
        return values.view(torch.bfloat16)
    mean, deviation = _need(mean, storage), _need(deviation, storage)
    assert scale is not None
    if storage == "int8":
        return torch.addcmul(mean, values.float().mul_(scale[:, None]), deviation)
    if storage == "int4":
        z = _decode_int4(values, scale, len(mean))
    else:
        z = restore(values, scale, _need(code, storage))
    return torch.addcmul(mean, z, varying(mean, deviation))


def _decode_int4(values: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    wide = torch.stack([values & 15, values >> 4], -1).flatten(1)[:, :width]  # [N, W] of 1 ... 15
    each = scale.float().repeat_interleave(GROUP, 1)[:, :width]  # [N, W]
    return (wide.float() - 8).mul_(each)


def _need(thing: Thing | None, storage: str) -> Thing:
    if thing is None:
        raise InputError(
            f"storage {storage} needs the family's mean and deviation, coded its code too: "
            "publish the shared states "
            "first"
        )
    return thing
