"""Compiling the repeated blocks: a model of 28 blocks compiles as fast as a block of each kind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from lidit.models.fusion import FusionBranch
from lidit.models.refiner import RefinerBlock
from lidit.models.transformer import LIDiTBlock, PositionBlock

BLOCKS = (LIDiTBlock, PositionBlock, RefinerBlock, FusionBranch)


# Kinds of graph that torch may keep of a block before it gives up and runs it as it is, without a
# word: training and validation, each for several numbers of images and tokens. torch's own limit is
# 8.
GRAPHS_KEPT = 64


def missing_tools() -> str | None:
    """What torch.compile lacks on this machine to compile for a GPU, None where
    nothing is missing.
    """
    compilers = (os.environ.get("CC"), "gcc", "cc", "clang")
    if not any(name and shutil.which(name) for name in compilers):
        return "no C compiler (gcc, or CC in the environment)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "no headers of Python (Python.h)"
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    return None


def why_not_compiled(device: torch.device) -> str | None:
    """Why blocks stay uncompiled on a device where nobody says otherwise; None where they are
    compiled.
    """
    if device.type != "cuda":
        return f"on {device.type} compiling takes longer than it saves"
    return missing_tools()


def compile_blocks(
    model: nn.Module, dynamic: bool | None = True, backend: str = "inductor"
) -> None:
    """Compile every repeated block of a model in place.

    Args:
        model: A `LIDiT`, or a part of it. Its parameters and their names stay as they are.
        dynamic: As in `torch.compile`; True compiles once for captions of any length.
        backend: As in `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_KEPT)
    for part in model.modules():
        if isinstance(part, BLOCKS):
            part.compile(dynamic=dynamic, backend=backend)
