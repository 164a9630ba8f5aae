"""Where a pipeline is loaded from and to: a folder or the hub, an LLM's files elsewhere, a device,
a dtype, fewer bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import PipelineQuantizationConfig

from lidit.errors import InputError
from lidit.hub import fetch_snapshot, is_hub_id
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.text import PromptEncoder

LOADER = "pipeline.py"
LOADER_TEXT = '''"""The class that DiffusionPipeline.from_pretrained(..., custom_pipeline=...) makes."""

from lidit.pipeline import LIDiTPipeline

__all__ = ["LIDiTPipeline"]
'''  # noqa: E501


def local_folder(folder: str | Path, revision: str | None, local_files_only: bool) -> Path:
    """The model folder on this machine; raises InputError where there is none."""
    path = Path(folder).expanduser()
    if path.exists() or not is_hub_id(str(folder)):
        if not path.is_dir():
            raise InputError(
                f"{folder}: no such model folder; give one that lidit train wrote, or a hub id"
            )
        return path
    return fetch_snapshot(
        str(folder), revision, ["*.json", "*.safetensors", "README.md"], local_files_only
    )


def replace_encoder(entry: ModelEncoder, replacement: str | Path | PromptEncoder) -> None:
    """Share a loaded LLM, or say where else the LLM's files are: a folder, or a hub id as
    `id@commit`.
    """
    if isinstance(replacement, PromptEncoder):
        entry.share(replacement)
    else:
        place, _, commit = str(replacement).partition("@")
        entry.settings = entry.settings.model_copy(
            update={"model": place, "revision": commit or None}
        )


def one_dtype(dtype: torch.dtype | None, torch_dtype: torch.dtype | None) -> torch.dtype | None:
    """The weights' dtype under either of its names; raises InputError for two, or for what is no
    dtype.
    """
    given = {value for value in (dtype, torch_dtype) if value is not None}
    if len(given) > 1:
        raise InputError(f"dtype is {dtype} and torch_dtype is {torch_dtype}: give one of them")
    chosen = next(iter(given), None)
    if chosen is not None and not isinstance(chosen, torch.dtype):
        raise InputError(f"torch_dtype: {chosen!r} is no dtype; give one such as torch.bfloat16")
    return chosen


def network_config(config: Any) -> Any:
    """How diffusers is to store the network, out of what a caller gives for a whole pipeline.

    Raises InputError where it names parts and none of them is the network, or only a backend, for
    then the LLMs would be meant too.
    """
    if not isinstance(config, PipelineQuantizationConfig):
        return config
    entries = config.quant_mapping or {}
    found = [entries[name] for name in ("model", "transformer") if name in entries]
    others = sorted(set(entries) - {"model", "transformer"})
    if len(found) != 1 or others:
        raise InputError(
            "quantization_config: give quant_mapping one entry, `model`, with the network's config"
            + (f"; {', '.join(others)}: only the network is quantized" if others else "")
        )
    return found[0]


def device_of(device_map: str | None) -> torch.device | None:
    """The device that all parts go to. Raises InputError for a plan that spreads them: the network
    is one piece.
    """
    if device_map is None:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise InputError(
            f"device_map: {device_map!r} is no device; give one such as cuda or cpu, "
            "and call enable_model_cpu_offload() where one GPU is too small"
        ) from None
