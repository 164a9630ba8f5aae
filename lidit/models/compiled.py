"""Compiling the repeated blocks: a model of 28 blocks compiles as fast as a block of each kind."""

from __future__ import annotations

from torch import nn

from lidit.models.fusion import FusionBranch
from lidit.models.refiner import RefinerBlock
from lidit.models.transformer import LIDiTBlock, PositionBlock

BLOCKS = (LIDiTBlock, PositionBlock, RefinerBlock, FusionBranch)


def compile_blocks(model: nn.Module, dynamic: bool | None = True, backend: str = "inductor") -> None:
    """Compile every repeated block of a model in place.

    Args:
        model: A `LIDiT`, or a part of it. Its parameters and their names stay as they are.
        dynamic: As in `torch.compile`; True compiles once for captions of any length.
        backend: As in `torch.compile`.
    """
    for part in model.modules():
        if isinstance(part, BLOCKS):
            part.compile(dynamic=dynamic, backend=backend)
