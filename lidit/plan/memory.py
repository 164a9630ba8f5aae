"""What a worker's memory holds: weights and all that trains them, DeepSpeed's buffers, activations.

Symbols: P parameters, N workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lidit.config import Recipe
from lidit.models import LIDiT, TextStates
from lidit.plan.subject import Facts, build_on_meta

# In elements: gradients reduced together, few enough that most are on their way before the backward
# pass ends, and DeepSpeed's default of gathered parameters that ZeRO-3 may keep for reuse.
REDUCE_BUCKET = 100_000_000
LIVE_PARAMETERS = 1_000_000_000
CHECKPOINTED_EVERY = (4, 3, 2, 1)  # blocks to one that is computed again, the cheapest first
GPU_SHARE = 0.95  # of a GPU's memory, for what is planned; fragments and libraries take the rest


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker. `states`: weights, gradients, optimizer moments, master weights,
    average.
    """

    states: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        return self.states + self.buffers + self.activations


def state_bytes(
    count: int, stage: int, workers: int, precision: str, accumulated: bool = False
) -> float:
    """Weights, gradients and everything the optimizer and the average keep for P = `count`, on one
    worker.

    ZeRO keeps master weights even in float32. Stage 0 has none: bfloat16 is then autocast over
    float32 weights. Stage 1 holds whole gradients and, while they are averaged, its own share of
    them again. accumulated: over several parts of a batch, from stage 2 on in float32.
    """
    share = count / workers
    low = 4 if precision == "float32" or stage == 0 else 2
    weights = low * (share if stage == 3 else count)
    kept = 4 if accumulated and stage >= 2 else low
    gradients = {0: low * count, 1: low * (count + share)}.get(stage, kept * share)
    master = 4 * share if stage else 0
    moments = 8 * (share if stage else count)
    average = 4 * share
    return weights + gradients + master + moments + average


def buffer_bytes(count: int, stage: int, precision: str, overlapping: bool = False) -> float:
    """What DeepSpeed holds for communication: a bucket of gradients, and under stage 3 gathered
    parameters.

    overlapping: on GPUs, where under stages 1 and 2 one bucket fills while another is summed.
    """
    low = 4 if precision == "float32" else 2
    buckets = {1: 2 if overlapping else 0, 2: 2 if overlapping else 1, 3: 1}.get(stage, 0)
    live = min(count, LIVE_PARAMETERS) if stage == 3 else 0
    return low * (buckets * min(count, REDUCE_BUCKET) + live)


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch would take the attention that stores all weights; on CPU and GPU it
    never does.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        mask = (kwargs or {}).get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(args[0].dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *args[:3], attn_mask=mask
        )[0]


def saved_bytes(
    model: LIDiT, latents: torch.Tensor, timestep: torch.Tensor, text: Mapping[str, TextStates]
) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters apart. On any device, meta
    included.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    # the storages stay alive here, so that no address comes twice
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(latents, timestep, text)
    del output
    return sum(storage.nbytes() for storage in kept.values())


def activation_bytes(recipe: Recipe, facts: Facts, micro_batch: int) -> float:
    """What one micro-batch keeps between forward and backward; with checkpointing also one block's
    own part.
    """
    dtype = torch.float32 if recipe.engine.precision == "float32" else torch.bfloat16
    found = {}
    for again in {False, recipe.model.activation_checkpointing}:
        model = build_on_meta(
            recipe.model.model_copy(update={"activation_checkpointing": again}), facts
        ).train()
        with torch.device("meta"), _FusedAttention():
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            text = {
                name: TextStates(
                    torch.empty(
                        micro_batch,
                        max(1, round(facts.caption_tokens[name])),
                        encoder.width,
                        dtype=dtype,
                    ),
                    torch.empty(
                        micro_batch, max(1, round(facts.caption_tokens[name])), dtype=torch.bool
                    ),
                    torch.empty(facts.prefix_tokens[name], encoder.width, dtype=dtype),
                )
                for name, encoder in facts.encoders.items()
            }
            latents = torch.empty(micro_batch, *facts.latent, dtype=dtype)
            found[again] = saved_bytes(model, latents, torch.empty(micro_batch), text)
    if not recipe.model.activation_checkpointing:
        return float(found[False])
    return found[True] + found[False] / model.config.depth


def checkpointing_that_fits(
    recipe: Recipe, facts: Facts, micro_batch: int, room: float
) -> int | None:
    """How few blocks must be computed again in the backward pass for activations to fit into `room`
    bytes.

    0: none; k: every k-th block of the transformer; None: they do not fit with every block either.
    """

    def needed(every: int, depth: int | None = recipe.model.depth) -> float:
        changes = {
            "depth": depth,
            "activation_checkpointing": every > 0,
            "checkpointed_every": every or None,
        }
        changed = recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})
        return activation_bytes(changed, facts, micro_batch)

    if needed(0) <= room:
        return 0
    # What a block keeps that is not computed again, of two blocks: all are alike.
    depth, block = build_on_meta(recipe.model, facts).config.depth, needed(2, 2) - needed(1, 2)
    least = needed(1)
    for every in CHECKPOINTED_EVERY:
        if least + (depth - math.ceil(depth / every)) * block <= room:
            return every
    return None
