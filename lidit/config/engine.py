"""Workers and how DeepSpeed shards them: settings of where and how fast a training goes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lidit.config.fields import Place
from lidit.config.settings import Settings


class EngineSettings(Settings):
    """Workers and how DeepSpeed shards them."""

    workers: int = Field(1, ge=1)
    min_workers: int | None = Field(
        None, ge=1, description="start and go on with as few as this when nodes are gone"
    )
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulation: int = Field(1, ge=1)
    # not nvme: DeepSpeed then takes the fp32 weights out of memory, where the average and the
    # checkpoints read them
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: Place | None = None
    fused_optimizer: bool = Field(
        False, description="DeepSpeed's fused AdamW; compiles on first use"
    )
    compile: bool | None = Field(
        None, description="torch.compile, block by block; None: on a GPU where a C compiler is"
    )
    max_failures: int = Field(3, ge=0, description="worker failures survived before the run fails")
    resources: dict[str, float] = Field(default_factory=dict)
    label_selector: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole_gpus(self) -> EngineSettings:
        # DeepSpeed and NCCL count devices as one per process; a lone worker may share its card with
        # other runs.
        if self.gpus_per_worker > 1 or (self.gpus_per_worker not in (0, 1) and self.workers > 1):
            raise ValueError(
                f"gpus_per_worker: {self.gpus_per_worker:g} is no number of GPUs that a worker "
                "can use; give 0 or 1 "
                "and more workers (a part of one only with engine.workers=1)"
            )
        return self
