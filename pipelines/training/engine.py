"""Training steps under DeepSpeed: one class for ZeRO 0 to 3, on CPU (gloo) and GPU (nccl), and
LI-DiT's on top.
"""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lidit.config import EngineSettings, Recipe, RunRecipe
from lidit.data.assembler import TrainingBatch
from lidit.diffusion import Objective
from lidit.errors import JobError
from lidit.models import LIDiT
from lidit.models.compiled import compile_blocks, missing_tools, why_not_compiled
from lidit.models.flops import forward_flops
from lidit.plan import REDUCE_BUCKET
from pipelines.runtime.kernels import use_tensor_cores
from pipelines.training.ema import ShardedEMA, owned_fragments
from pipelines.training.gradients import measure_at_once
from pipelines.training.mfu import Flops
from pipelines.training.partition import is_partitioned, partition_from_rank_zero
from pipelines.training.schedule import learning_rate

log = logging.getLogger(__name__)
# caption tokens; of 1, 32 and 64 the fastest on an H100 (benchmarks/README.md)
GPU_LENGTH_MULTIPLE = 64


def set_up_device(engine: EngineSettings) -> torch.device:
    """This worker's device: its GPU if the recipe gives it one, else the CPU with its threads.

    Raises JobError where the recipe wants a GPU and torch sees none.
    """
    if not engine.gpus_per_worker:
        torch.set_num_threads(max(1, int(engine.cpus_per_worker)))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise JobError(
            f"engine.gpus_per_worker is {engine.gpus_per_worker:g}, but torch sees no GPU on "
            "this node: it needs a "
            "CUDA build of torch and a driver"
        )
    use_tensor_cores()
    return torch.device("cuda", torch.cuda.current_device())


def require_tools(device: torch.device) -> None:
    """Raise JobError where a recipe asks for compiling that cannot work here; torch would tell in
    the first step.
    """
    if device.type == "cuda" and (missing := missing_tools()):
        raise JobError(
            f"engine.compile is true, but this node has {missing}; install gcc and Python's "
            "headers (of our images "
            "cuda-compile has them), or set engine.compile=false"
        )


@dataclass(frozen=True)
class StepResult:
    """Means over the global batch.

    `finite` is False when the step was not taken: because of a worker's loss (then `gradient_norm`
    is NaN and `loss` this worker's own) or of the gradient (then it is infinite). `wish`: rank 0's.
    """

    loss: float
    gradient_norm: float
    finite: bool
    wish: int = 0


def micro_steps(recipe: RunRecipe, world_size: int) -> int:
    """Parts into which each worker cuts its share of a batch: none larger than with all of the
    recipe's workers.

    (With one sample a part there, shares of unequal size may need parts of two.)
    """
    batch, engine = recipe.train.batch_size, recipe.engine
    largest = batch // (engine.workers * engine.accumulation)
    share = -(-batch // world_size)
    return min(-(-share // largest), batch // world_size)


def deepspeed_config(recipe: RunRecipe, world_size: int, parameters: int) -> dict[str, Any]:
    """The DeepSpeed settings a recipe means for a model of so many `parameters`."""
    engine, train = recipe.engine, recipe.train
    # The bucket is allocated whole: gigabytes that a small model would never fill.
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": min(parameters, REDUCE_BUCKET),
    }
    for part, target in (
        ("optimizer", engine.offload_optimizer),
        ("param", engine.offload_parameters),
    ):
        if target != "none":
            zero[f"offload_{part}"] = {"device": target, "pin_memory": True}
            if target == "nvme":
                zero[f"offload_{part}"]["nvme_path"] = engine.nvme_path
    # Under stage 3 sums overlap the backward pass anyway; on a CPU there is nothing beside it.
    if engine.gpus_per_worker and engine.zero_stage in (1, 2) and world_size > 1:
        zero["overlap_comm"] = True
    parts = micro_steps(recipe, world_size)
    micro = -(-train.batch_size // (world_size * parts))
    config: dict[str, Any] = {
        # more than the batch where it is cut unevenly: for logs only
        "train_batch_size": micro * parts * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": train.optimizer.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    # Eight sums in bfloat16 lose what the eighth part adds. (Under stage 1 it would be another
    # optimizer of DeepSpeed's, without shares that checkpoints know.)
    if engine.precision == "bfloat16" and engine.zero_stage >= 2 and parts > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if engine.offload_optimizer != "none" and not engine.fused_optimizer:
        config["zero_force_ds_cpu_optimizer"] = False
    if engine.precision == "bfloat16":
        # Without ZeRO there is no fp32 master copy, so bfloat16 weights would lose small updates:
        # autocast instead.
        kind = "torch_autocast" if engine.zero_stage == 0 else "bf16"
        config[kind] = {"enabled": True} | ({"dtype": "bfloat16"} if engine.zero_stage == 0 else {})
    if engine.fused_optimizer:
        config["optimizer"] = {
            "type": "AdamW",
            "params": {
                "lr": train.optimizer.lr,
                "betas": list(train.optimizer.betas),
                "weight_decay": train.optimizer.weight_decay,
            },
        }
    return config


class Batch(Protocol):
    """This worker's part of global batch number `step`. tokens: for rates; positions the model
    looks at.
    """

    @property
    def step(self) -> int: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def tokens(self) -> int: ...
    def to(self, device: torch.device) -> Self: ...
    def split(self, parts: int) -> list[Self]: ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class ShardedEngine(ABC, Generic[AnyBatch]):
    """Takes global steps of any model; `device` is this worker's."""

    def __init__(self, recipe: RunRecipe, model: nn.Module, device: torch.device) -> None:
        # DeepSpeed would take a GPU it finds, also for a CPU training: tensors would lie on both
        # devices.
        os.environ["DS_ACCELERATOR"] = "cpu" if device.type == "cpu" else "cuda"
        import deepspeed
        from deepspeed.ops import __compatible_ops__

        # compiling it takes a minute, and one process per core gains nothing from it
        if device.type == "cpu":
            __compatible_ops__["deepspeed_shm_comm"] = False
        self.recipe, self.device = recipe, device
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.micro_steps = micro_steps(recipe, self.world_size)
        settings = recipe.train.optimizer
        count = sum(p.numel() for p in model.parameters())
        config = deepspeed_config(recipe, self.world_size, count)
        # Before its settings are read: they would count one worker where its own communication has
        # not begun.
        deepspeed.init_distributed(
            deepspeed.accelerator.get_accelerator().communication_backend_name(),
            dist_init_required=False,
        )
        if is_partitioned(recipe.engine):
            partition_from_rank_zero(model, config, device, self.compute_dtype)
        optimizer = None
        if not recipe.engine.fused_optimizer:
            # Over DeepSpeed's flat buffers torch's other AdamW takes a dozen passes, the fused one
            # a single pass.
            fused = device.type == "cuda" and recipe.engine.offload_optimizer == "none"
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=settings.lr, betas=settings.betas,
                weight_decay=settings.weight_decay,
                fused=fused,
            )  # fmt: skip
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            dist_init_required=False,
            config=config,
        )
        sharded = recipe.engine.zero_stage in (1, 2) and recipe.engine.offload_optimizer == "none"
        if device.type == "cuda" and sharded:  # a CPU's kernels cost nothing to launch
            measure_at_once(self.deepspeed.optimizer)
        self._compile_if_wanted()
        self.ema = ShardedEMA(owned_fragments(self.deepspeed), recipe.train.ema_decay)
        self._own_norm = recipe.engine.zero_stage == 0

    def _compile_if_wanted(self) -> None:
        if self.recipe.engine.compile:
            require_tools(self.device)
            self.deepspeed.compile()

    @abstractmethod
    def loss(self, batch: AnyBatch) -> torch.Tensor:
        """Mean loss of (a part of) a batch, float32 scalar; forward passes go through
        `self.deepspeed`.
        """

    @abstractmethod
    def step_flops(self, batch: AnyBatch) -> Flops | None:
        """What a step on this batch takes this worker, at no cost worth mentioning; None where
        nobody can say.
        """

    @property
    def compute_dtype(self) -> torch.dtype:
        low = self.recipe.engine.precision == "bfloat16" and self.recipe.engine.zero_stage > 0
        return torch.bfloat16 if low else torch.float32

    def train_step(self, batch: AnyBatch, wish: Callable[[], int] = lambda: 0) -> StepResult:
        """One optimizer step on this worker's part of a global batch.

        Where a loss or a gradient is not finite on any worker, no worker takes the step and no
        weight changes. wish: asked on every rank at the end of the step; the sum of the answers
        comes with the losses' sum, so that a step waits for the other workers once.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.train, batch.step)
        parts = batch.split(self.micro_steps)
        total, norm = torch.zeros((), device=self.device), None
        for part in parts:
            # A mean over all samples, however unequal the parts are; 1 where they are equal.
            weight = len(part.keys) * len(parts) * self.world_size / self.recipe.train.batch_size
            loss = self.loss(part) * weight
            total += loss.detach() / len(parts)
            # A loss that is not finite makes every gradient so, on every worker, and such a step is
            # not taken.
            self.deepspeed.backward(loss)
            norm = self._gradient_norm() if self._own_norm else None
            if norm is not None and part is parts[-1] and not torch.isfinite(norm):
                self.deepspeed.zero_grad()  # DeepSpeed looks at gradients from stage 1 on only
                return self._result(total, math.inf, taken=False, wish=wish())
            self.deepspeed.step()
        taken = self.deepspeed.was_step_applied()
        if taken:
            self.ema.update()
            norm = norm if self._own_norm else self.deepspeed.get_global_grad_norm()
        return self._result(total, norm if taken else math.inf, taken, wish())

    def _result(
        self, total: torch.Tensor, norm: torch.Tensor | float | None, taken: bool, wish: int
    ) -> StepResult:
        """What all workers learn of a step, by a single sum over them. total: of this worker's
        losses.
        """
        asked = torch.full_like(total, wish)
        sums = torch.stack([total, (~torch.isfinite(total)).to(total), asked])
        dist.all_reduce(sums)
        loss, bad, wishes = sums.tolist()
        if bad:
            if taken:
                raise RuntimeError(
                    "a loss is not finite, and DeepSpeed has taken the step all the same"
                )
            return StepResult(float(total), math.nan, finite=False, wish=int(wishes))
        return StepResult(
            loss / self.world_size, float(norm or 0.0), finite=taken, wish=int(wishes)
        )

    def _gradient_norm(self) -> torch.Tensor:
        gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


class Engine(ShardedEngine[TrainingBatch]):
    """LI-DiT and its objective. The prefixes of the text are in the batches."""

    recipe: Recipe

    def __init__(
        self, recipe: Recipe, model: LIDiT, objective: Objective, device: torch.device
    ) -> None:
        super().__init__(recipe, model, device)
        self.objective = objective
        # On a GPU each new caption length costs compiling and cuDNN's planning; on a CPU rounding
        # only pads.
        self._length_multiple = GPU_LENGTH_MULTIPLE if device.type == "cuda" else 1

    @property
    def module(self) -> LIDiT:
        module: LIDiT = self.deepspeed.module
        return module

    def _compile_if_wanted(self) -> None:
        engine = self.recipe.engine
        # its hooks inside the blocks gather their weights: only all at once, where asked
        if engine.zero_stage == 3:
            super()._compile_if_wanted()
            return
        wanted, reason = engine.compile, why_not_compiled(self.device)
        if wanted:
            require_tools(self.device)
        elif wanted is None and reason and self.device.type == "cuda" and self.rank == 0:
            log.warning("blocks are not compiled: %s; a step takes about a third longer", reason)
        if wanted or (wanted is None and reason is None):
            compile_blocks(self.module)

    def loss(self, batch: TrainingBatch) -> torch.Tensor:
        t = self.objective.timesteps(batch.u)
        noisy = self.objective.add_noise(batch.latents, batch.noise, t)
        text = {name: states.rounded(self._length_multiple) for name, states in batch.text.items()}
        prediction = self.deepspeed(noisy.to(self.compute_dtype), t, text)
        return self.objective.loss(prediction, batch.latents, batch.noise, t, noisy).mean()

    def step_flops(self, batch: TrainingBatch) -> Flops:
        """By formula: under every ZeRO stage, for the lengths of this very batch."""
        count, size = len(batch.keys), (batch.latents.shape[-2], batch.latents.shape[-1])
        prefix = {name: len(states.prefix) for name, states in batch.text.items()}
        padded = {
            name: -(-states.mask.shape[1] // self._length_multiple) * self._length_multiple
            for name, states in batch.text.items()
        }
        filled = batch.tokens / (count * sum(padded.values()))  # of the places: no padding
        useful, computed = (
            3.0 * count * sum(forward_flops(self.module, size, tokens, prefix).values())
            for tokens in ({name: length * filled for name, length in padded.items()}, padded)
        )
        return Flops(useful, computed)
