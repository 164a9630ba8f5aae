"""Training and what follows it: data, optimizer, scores, tracker, plan."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lidit.config.fields import Fraction, Place, Prompt, Seed
from lidit.config.model import SamplerSettings
from lidit.config.settings import Settings, validate


class DataSettings(Settings):
    """How a corpus becomes batches: their order, their captions, and what is held out."""

    seed: Seed = Field(0, description="of order, captions, noise and timesteps")
    window_units: int = Field(16, ge=1, description="units shuffled together")
    caption_dropout: Fraction = Field(
        0.1, description="share of samples with the empty caption, for guidance"
    )
    origin_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="caption origin -> weight; empty: every caption alike"
    )
    sort_by_unit: bool | None = Field(
        None,
        description="workers share a batch out by unit, so that each opens few; None: as it is "
        "drawn",
    )
    prefetch_batches: int = Field(4, ge=0, description="batches read ahead")
    readers: int = Field(2, ge=1, le=64, description="threads of a worker that read batches")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of samples kept out of training"
    )


class OptimizerSettings(Settings):
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    gradient_clip: float = Field(1.0, ge=0, description="0 leaves gradients unclipped")
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "constant_linear"] = Field(
        "constant",
        description="constant_linear: constant to 60 % of the steps, then linear to 10 %",
    )


class LoopSettings(Settings):
    """What every training has, of LI-DiT or of a codec."""

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=1, description="global: over all workers and accumulation steps")
    optimizer: OptimizerSettings = OptimizerSettings()
    ema_decay: float = Field(
        0.9999, ge=0, lt=1, description="upper bound; early steps use (n+1)/(n+10)"
    )
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    keep_best: bool = Field(
        False, description="keep those of the lowest validation loss, and the newest"
    )
    async_upload: bool = Field(
        False, description="go on while a checkpoint is copied to the run's folder"
    )
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(0, ge=0)
    validation_samples: int = Field(256, ge=1)
    non_finite: Literal["stop", "skip"] = "stop"


class TrainSettings(LoopSettings):
    sample_every: int = Field(0, ge=0, description="0: sample only at the end")
    sample_prompts: tuple[Prompt, ...] = ()
    init_from: Place | None = Field(None, description="model folder whose weights start the run")


class SamplerChanges(Settings):
    """What to draw with in place of a model's own sampler; None leaves the model's."""

    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    guidance_interval: tuple[Fraction, Fraction] | None = None
    guidance_rescale: Fraction | None = None
    scheduler: Literal["auto", "ddpm", "ddim", "dpm_solver", "euler"] | None = None

    def applied(self, sampler: SamplerSettings) -> SamplerSettings:
        """`sampler` with these changes. Raises InputError for values no sampler takes."""
        return validate(
            SamplerSettings,
            {**sampler.model_dump(), **self.model_dump(exclude_none=True)},
            "sampling",
        )


class EvaluateSettings(Settings):
    sampler: SamplerChanges = SamplerChanges()
    per_tag: int = Field(24, ge=1, description="prompts per category")
    images_per_prompt: int = Field(1, ge=1)
    layout: Literal["simple", "free"] = "simple"
    tags: tuple[str, ...] = ()
    binding_scenes: int = Field(256, ge=2, description="scenes per measure of binding accuracy")
    pictures: int = Field(256, ge=2, description="held-out pictures whose captions are compared")
    seed: Seed = 1
    batch_size: int = Field(64, ge=1)


class TrackingSettings(Settings):
    """Where MLflow's store is. None: a sqlite file, mlflow.db, in `output`."""

    uri: Place | None = None
    experiment: str = Field("lidit", min_length=1, max_length=500)
    registered_model: str | None = Field(None, pattern=r"^[^/:]+$")
    alias: str = Field("newest", pattern=r"^[\w-]+$")

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str) -> str:
        if alias.lower() == "latest" or alias.lower().removeprefix("v").isdigit():
            raise ValueError(
                "MLflow reserves `latest` and version numbers; choose a word such as newest"
            )
        return alias


class CardSettings(Settings):
    """What the published model's card says in the hub's words; nothing that is computed depends on
    it.
    """

    license: str | None = Field(
        None, min_length=1, description="of the model, a name of the hub: apache-2.0"
    )
    datasets: tuple[str, ...] = Field((), description="hub ids of what the corpus was made of")


class EncoderShape(Settings):
    """An LLM's size, for plans made before its files are there."""

    width: int = Field(ge=1)
    blocks: int = Field(ge=1)
    block_parameters: int = Field(ge=1, description="of one block, embeddings apart")


class PlanSettings(Settings):
    """What `lidit plan` assumes where no corpus or model file says otherwise, and
    what things cost.
    """

    samples: int | None = Field(None, ge=1)
    captions_per_sample: float = Field(1.0, ge=1)
    caption_tokens: float = Field(
        64.0, gt=0, description="mean tokens of a caption, the prefix not counted"
    )
    prefix_tokens: int = Field(40, ge=0)
    encoders: dict[str, EncoderShape] = Field(
        default_factory=dict, description="encoder -> its size"
    )
    latent: tuple[int, int, int] | None = Field(None, description="channels, height, width")
    gpus: int | None = Field(None, ge=1, description="None: engine.workers")
    gpus_per_node: int = Field(8, ge=1)
    gpu_gigabytes: float = Field(80.0, gt=0)
    peak_tflops: float = Field(989.0, gt=0, description="dense bfloat16 of one GPU; 989 is an H100")
    mfu: float = Field(0.4, gt=0, le=1, description="share of the peak that training reaches")
    embed_mfu: float = Field(0.4, gt=0, le=1)
    price_per_gpu_hour: float = Field(2.5, ge=0)
    price_per_terabyte_month: float = Field(20.0, ge=0, description="of stored states")
    months: float = Field(1.0, ge=0, description="how long states are stored")
    coded_bits: float = Field(3.2, gt=0, description="bits per value of coded states")
