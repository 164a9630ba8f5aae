"""Training steps under DeepSpeed: one class for ZeRO 0 to 3, on CPU (gloo) and GPU (nccl), and
LI-DiT's on top.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
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
from lidit.models.compiled import compile_blocks
from lidit.plan import REDUCE_BUCKET
from pipelines.training.ema import ShardedEMA, owned_fragments
from pipelines.training.gradients import measure_at_once
from pipelines.training.schedule import learning_rate

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
    return torch.device("cuda", torch.cuda.current_device())


@dataclass(frozen=True)
class StepResult:
    """Means over the global batch.

    `finite` is False when the step was not taken: because of a worker's loss (then `gradient_norm`
    is NaN) or of the gradient (then it is infinite).
    """

    loss: float
    gradient_norm: float
    finite: bool


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
            config=deepspeed_config(
                recipe, self.world_size, sum(p.numel() for p in model.parameters())
            ),
        )
        sharded = recipe.engine.zero_stage in (1, 2) and recipe.engine.offload_optimizer == "none"
        if device.type == "cuda" and sharded:  # a CPU's kernels cost nothing to launch
            measure_at_once(self.deepspeed.optimizer)
        if recipe.engine.compile:
            self._compile()
        self.ema = ShardedEMA(owned_fragments(self.deepspeed), recipe.train.ema_decay)
        self._own_norm = recipe.engine.zero_stage == 0

    def _compile(self) -> None:
        self.deepspeed.compile()

    @abstractmethod
    def loss(self, batch: AnyBatch) -> torch.Tensor:
        """Mean loss of (a part of) a batch, float32 scalar; forward passes go through
        `self.deepspeed`.
        """

    @abstractmethod
    def forward(self, batch: AnyBatch) -> None:
        """The model's forward pass alone, on this worker alone, for counting what it computes."""

    @property
    def compute_dtype(self) -> torch.dtype:
        low = self.recipe.engine.precision == "bfloat16" and self.recipe.engine.zero_stage > 0
        return torch.bfloat16 if low else torch.float32

    def train_step(self, batch: AnyBatch) -> StepResult:
        """One optimizer step on this worker's part of a global batch.

        Where a loss or a gradient is not finite on any worker, no worker takes the step and no
        weight changes.
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
            if not self._finite_everywhere(loss):
                return StepResult(float(loss), math.nan, finite=False)
            self.deepspeed.backward(loss)
            norm = self._gradient_norm() if self._own_norm else None
            if norm is not None and part is parts[-1] and not torch.isfinite(norm):
                self.deepspeed.zero_grad()  # DeepSpeed looks at gradients from stage 1 on only
                return StepResult(self._mean(total), math.inf, finite=False)
            self.deepspeed.step()
        if not self.deepspeed.was_step_applied():
            return StepResult(self._mean(total), math.inf, finite=False)
        if not self._own_norm:
            norm = self.deepspeed.get_global_grad_norm()
        self.ema.update()
        return StepResult(self._mean(total), float(norm or 0.0), finite=True)

    def _mean(self, total: torch.Tensor) -> float:
        dist.all_reduce(total)
        return float(total) / self.world_size

    def _finite_everywhere(self, loss: torch.Tensor) -> bool:
        bad = (~torch.isfinite(loss.detach())).float()
        dist.all_reduce(bad)
        return bad.item() == 0

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

    def _compile(self) -> None:
        if self.recipe.engine.zero_stage == 3:  # its hooks inside the blocks gather their weights
            super()._compile()
        else:
            compile_blocks(self.module)

    def loss(self, batch: TrainingBatch) -> torch.Tensor:
        t = self.objective.timesteps(batch.u)
        noisy = self.objective.add_noise(batch.latents, batch.noise, t)
        text = {name: states.rounded(self._length_multiple) for name, states in batch.text.items()}
        prediction = self.deepspeed(noisy.to(self.compute_dtype), t, text)
        return self.objective.loss(prediction, batch.latents, batch.noise, t, noisy).mean()

    def forward(self, batch: TrainingBatch) -> None:
        self.module(batch.latents.to(next(self.module.parameters()).dtype), batch.u, batch.text)
