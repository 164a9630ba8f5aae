"""The moving average of the weights (EMA), over fp32 fragments (parameter, start, length).

ZeRO keeps master weights and optimizer moments in flat buffers, cut at other places for every
stage and world size. Named by parameter and offset, the same numbers can be averaged (EMA), saved
and loaded without knowing stage or world size, so a checkpoint moves from any (stage, workers) to
any other.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

AnyModel = TypeVar("AnyModel", bound=nn.Module)
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of a flattened parameter; they lie at `offset` of the flat
    buffer `flat`.
    """

    name: str
    start: int
    length: int
    flat: torch.Tensor
    offset: int

    @property
    def master(self) -> torch.Tensor:
        """The fp32 weights, a live view [length]."""
        return self.flat.detach().view(-1).narrow(0, self.offset, self.length)

    def moment(self, optimizer: torch.optim.Optimizer, kind: str) -> torch.Tensor:
        """An optimizer moment, a live view [length]. KeyError before the first step."""
        return optimizer.state[self.flat][kind].view(-1).narrow(0, self.offset, self.length)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer below DeepSpeed's wrappers."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def live_fragments(engine: Any) -> list[Fragment]:
    """The fragments this rank holds; under stage 0 they cover the whole model."""
    stage = engine.zero_optimization_stage()
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 0:
        return [Fragment(name, 0, p.numel(), p, 0) for name, p in named]
    if stage == 3:
        return [f for name, p in named if (f := _stage3(engine.optimizer, name, p))]
    return [f for name, p in named if (f := _stage12(engine.optimizer, name, p))]


def owned_fragments(engine: Any) -> list[Fragment]:
    """This rank's share of the fragments: over all ranks, every number exactly once."""
    live = live_fragments(engine)
    if engine.zero_optimization_stage() > 0:
        return live
    world, rank = dist.get_world_size(), dist.get_rank()
    owned = []
    for fragment in live:
        share = -(-fragment.length // world)
        start, stop = min(rank * share, fragment.length), min((rank + 1) * share, fragment.length)
        if stop > start:
            owned.append(Fragment(fragment.name, start, stop - start, fragment.flat, start))
    return owned


def _stage12(optimizer: Any, name: str, parameter: torch.Tensor) -> Fragment | None:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # another rank holds all of this parameter
        return None
    flats = (
        getattr(optimizer, "single_partition_of_fp32_groups", None)
        or optimizer.fp32_groups_flat_partition
    )
    place = mapping.hp_fragment_address
    lp = mapping.lp_fragment_address
    return Fragment(name, lp.start, lp.numel, flats[mapping.param_group_index], place.start)


def _stage3(optimizer: Any, name: str, parameter: Any) -> Fragment | None:
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = length * dist.get_rank()
    length = min(length, parameter.ds_numel - start)  # the last shard is padded
    if length <= 0:
        return None
    return Fragment(name, start, length, optimizer.fp32_partitioned_groups_flat[group], offset)


class ShardedEMA:
    """Exponential moving average of the fp32 weights, each rank its share (decay min(d,
    (n+1)/(n+10))).
    """

    def __init__(self, fragments: list[Fragment], decay: float) -> None:
        self.fragments, self.decay, self.updates = fragments, decay, 0
        self.average = [fragment.master.clone() for fragment in fragments]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (self.updates + 1) / (self.updates + 10))
        torch._foreach_lerp_(
            self.average, [f.master.to(a) for f, a in zip(self.fragments, self.average)], 1 - decay
        )
        self.updates += 1


def gather_full(
    shapes: dict[str, torch.Size],
    fragments: list[Fragment],
    values: list[torch.Tensor],
    device: torch.device,
) -> dict[str, torch.Tensor] | None:
    """Fragments of all ranks put together on rank 0, one parameter at a time, on the CPU; None on
    other ranks.

    device: the worker's, on which its process group computes; offloaded values lie elsewhere.
    """
    held: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for fragment, value in zip(fragments, values):
        held.setdefault(fragment.name, []).append((fragment.start, value))
    full: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        flat = torch.zeros(shape.numel(), device=device)
        for start, value in held.get(name, []):
            flat[start : start + len(value)] = value.to(device)
        dist.reduce(flat, 0)
        if dist.get_rank() == 0:
            full[name] = flat.view(shape).cpu()
    return full if dist.get_rank() == 0 else None


def without_trained_numbers(model: AnyModel) -> AnyModel:
    """The model with everything that training changes on the meta device. Frozen weights, as they
    are below adapters, stay: no average has them.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to("meta")
    return model


def averaged_model(
    engine: Any, ema: ShardedEMA, fresh: AnyModel | None, device: torch.device
) -> AnyModel | None:
    """A model with the averaged weights, on the CPU. Collective; None on other ranks than 0.

    fresh: rank 0's copy of the model `without_trained_numbers`, because a sharded engine has no
    whole model to put weights into. It stays as it is: what is returned is the
    caller's alone, and its memory is free again when the caller is done.
    device: the worker's, on which its process group computes.
    """
    full = gather_full(full_shapes(engine), ema.fragments, ema.average, device)
    if full is None or fresh is None:
        return None
    model = copy.deepcopy(fresh)
    _, unexpected = model.load_state_dict(full, strict=False, assign=True)
    for name, buffer in engine.module.named_buffers():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = buffer.detach().cpu().clone()
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    if unexpected or (missing := [name for name, tensor in tensors if tensor.is_meta]):
        raise RuntimeError(f"the averaged weights do not fit the model: {unexpected or missing}")
    return model.eval()


def full_shapes(engine: Any) -> dict[str, torch.Size]:
    """Shapes of the trained parameters, also where ZeRO-3 has emptied them."""
    return {
        n: getattr(p, "ds_shape", p.shape)
        for n, p in engine.module.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()
def load_numbers(engine: Any, ema: ShardedEMA, read: Any, taken: int) -> None:
    """Put saved numbers back. `read(kind, name, first, last)` gives elements [first, last) of a
    parameter's flat fp32 tensor, kind "master", "ema" or a moment.

    taken: steps the optimizer took, by which it corrects the bias of its moments.
    """
    optimizer = inner_optimizer(engine)
    for fragment in live_fragments(engine):
        cut = fragment.start, fragment.start + fragment.length
        fragment.master.copy_(read("master", fragment.name, *cut))
        if taken == 0:
            continue
        state = optimizer.state[fragment.flat]
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(
                    fragment.flat, memory_format=torch.preserve_format
                ).detach()
            fragment.moment(optimizer, kind).copy_(read(kind, fragment.name, *cut))
        # torch's fused optimizers keep the count beside the weights, the others on the CPU.
        beside = fragment.flat.device if optimizer.defaults.get("fused") else torch.device("cpu")
        state["step"] = torch.tensor(float(taken), device=beside)
    for fragment, average in zip(ema.fragments, ema.average):
        average.copy_(read("ema", fragment.name, fragment.start, fragment.start + fragment.length))
    for name, parameter in _writable_parameters(engine):
        parameter.data.copy_(read("master", name, 0, parameter.numel()).view(parameter.shape))


def _writable_parameters(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The computing copies of the parameters, whole, one after the other. Under stage 3 rank 0 gets
    them, and the others their parts from it.
    """
    if engine.zero_optimization_stage() < 3:
        yield from ((n, p) for n, p in engine.module.named_parameters() if p.requires_grad)
        return
    import deepspeed

    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    yield name, parameter
