"""Every setting of the system, one pydantic tree. Unknown keys, wrong types and values out of range
are refused.

A recipe (YAML) is one `Recipe`; `pipelines` and `jobs` pass its sections on as they are. Sections
are frozen, so a setting can be read anywhere and changed nowhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lidit.config.encoder import EncoderSettings
from lidit.config.fields import Place, Prompt, Seed
from lidit.config.settings import Settings, validate

Fraction = Annotated[float, Field(ge=0, le=1)]
Stage = Literal["ingest", "embed", "latents", "train", "evaluate"]


# ------------------------------------------------------------------------------------------------
# What is computed once per corpus


class IngestSettings(Settings):
    """How sources become a corpus (design: the corpus on disk)."""

    unit_samples: int = Field(1024, ge=1, description="most samples in one unit")
    resolution: int = Field(256, ge=8, description="base side of the aspect buckets, pixels")
    bucket_multiple: int = Field(
        16, ge=1, description="bucket sides are multiples of this: codec factor x patch size"
    )
    min_side: int = Field(
        0, ge=0, description="images with a shorter side are quarantined; 0 keeps all"
    )
    min_aesthetic: float | None = Field(
        None, description="the paper keeps 4.7 and above; None keeps all"
    )
    max_aspect: float = Field(4.0, ge=1, description="widest bucket, long side / short side")
    refuse_url_captions: bool = False
    refuse_tag_captions: bool = False
    min_caption_chars: int = Field(1, ge=0)
    max_caption_chars: int = Field(100_000, ge=1)
    class_template: str | None = Field(
        None, description='for class names as captions: "a photo of {class}"'
    )
    class_names: Place | None = Field(
        None, description="text file: one class name per line, or `label name` pairs"
    )
    caption_fields: dict[str, str] = Field(
        {
            "caption": "original",
            "text": "original",
            "synthetic_caption": "synthetic",
            "recaption": "synthetic",
        },
        description="field of a JSON member, row or table that holds a caption -> its origin",
    )
    image_fields: tuple[str, ...] = ("image", "jpg", "png", "image_path", "file_name", "path")
    captions_only: bool = Field(False, description="take captions and leave images where they are")
    unique_keys: Literal["corpus", "file"] = Field(
        "corpus", description="file: keys may start anew in every file"
    )
    max_pixels: int = Field(
        64_000_000, ge=1, description="larger images are refused before they are decoded"
    )


class PoolSettings(Settings):
    """The actors of one job and what each of them gets."""

    actors: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    token_budget: int = Field(8192, ge=1, description="padded tokens in one forward pass")
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources of each actor"
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels each actor asks for"
    )


class CodecSettings(Settings):
    """Image <-> latents. `pixels` is the identity on [-1, 1]; everything else is a diffusers
    autoencoder.
    """

    name: str = Field("pixels", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    model: Place | None = Field(
        None, description="hub id or folder of a diffusers autoencoder; None for pixels"
    )
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    posterior: Literal["mean", "sample"] = Field(
        "sample",
        description="sample: mean and deviation are stored, and sampled anew in every epoch",
    )
    storage: Literal["float32", "bfloat16"] = Field(
        "float32", description="of latents; pixels are always 8 bits"
    )
    scale: int = Field(
        1, ge=1, le=8, description="buckets of the corpus times this: 2 for twice the resolution"
    )


# ------------------------------------------------------------------------------------------------
# The model


class RefinerSettings(Settings):
    """Linguistic token refiner (paper 3.1; tables 2, 3 and 5)."""

    depth: int = Field(2, ge=0, description="blocks N; 0 leaves the refiner out")
    causal: bool = Field(False, description="keep the causal mask (table 3)")
    gated: bool = Field(True, description="adaptive gates, zero at start (table 5)")
    mixing: bool = Field(
        True, description="False: attention sees only the own token (parameter-matched control)"
    )


class FusionSettings(Settings):
    """How several LLMs become one text condition (paper 3.1; table 6)."""

    mode: Literal["none", "concatenation", "refiner"] = Field(
        "refiner",
        description="none: exactly one LLM; concatenation: along the sequence; refiner: "
        "collaborative",
    )
    depth: int = Field(1, ge=1)


class ModelSettings(Settings):
    """LI-DiT's shape. A preset fills width, depth, heads and patch size; single
    values override it.
    """

    preset: Literal["tiny", "S", "B", "L", "1B", "10B"] = "tiny"
    width: int | None = Field(None, ge=8)
    depth: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    patch_size: int | None = Field(None, ge=1)
    refiner: RefinerSettings = RefinerSettings()
    fusion: FusionSettings = FusionSettings()
    visible_tokens: int | None = Field(
        None,
        ge=1,
        description="the transformer sees the first N caption tokens only, the refiners all "
        "(control)",
    )
    layers: Literal["one", "mean", "learned", "per_block"] = Field(
        "one",
        description="how layers that an encoder keeps apart (join: separate) become one state per "
        "token",
    )
    activation_checkpointing: bool = False


class ObjectiveSettings(Settings):
    """What the network predicts and how the loss weighs it (paper appendix A.1 and two more)."""

    kind: Literal["ddpm", "rectified_flow", "clean"] = "ddpm"
    timesteps: Literal["uniform", "logit_normal"] | None = Field(
        None, description="None: uniform for ddpm, logit_normal for the others"
    )
    train_steps: int = Field(1000, ge=2, description="ddpm: discrete noise levels")


class SamplerSettings(Settings):
    steps: int = Field(25, ge=1)
    guidance_scale: float = Field(3.0, ge=0)
    guidance_interval: tuple[Fraction, Fraction] = Field(
        (0.0, 1.0), description="timesteps where guidance acts"
    )
    guidance_rescale: Fraction = 0.0
    scheduler: Literal["auto", "ddpm", "ddim", "dpm_solver", "euler"] = Field(
        "auto", description="auto: ddim for ddpm, euler for the others"
    )

    @model_validator(mode="after")
    def _interval(self) -> SamplerSettings:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(
                f"guidance_interval: ({low:g}, {high:g}) is empty, so guidance would never act; "
                "swap the two"
            )
        return self


# ------------------------------------------------------------------------------------------------
# Training


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
    prefetch_batches: int = Field(4, ge=0, description="batches read ahead")
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
    compile: bool = False
    max_failures: int = Field(3, ge=0, description="worker failures survived before the run fails")
    resources: dict[str, float] = Field(default_factory=dict)
    label_selector: dict[str, str] = Field(default_factory=dict)


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


def _absolute(place: str | None) -> str | None:
    """A folder's absolute path; a hub id as it is."""
    return str(Path(place).resolve()) if place and Path(place).is_dir() else place


class RunRecipe(Settings):
    """What every training run is made of, of LI-DiT or of a codec."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="run name: the same name resumes the run",
    )
    output: Place = Field("runs", description="folder of runs; the run's files are in OUTPUT/NAME")
    corpus: Place = Field(description="folder or URL")
    train: LoopSettings = LoopSettings()
    engine: EngineSettings = EngineSettings()
    tracking: TrackingSettings = TrackingSettings()

    @field_validator("output")
    @classmethod
    def _a_folder(cls, output: str) -> str:
        # Path("s3://bucket") is the local folder `s3:/bucket`: every node would write a run of its
        # own.
        if "://" in output:
            raise ValueError(
                "must be a folder that every node sees, not a URL; mount shared storage, "
                "give its path"
            )
        return output

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.train.non_finite == "skip" and (
            self.engine.accumulation > 1 or self.engine.min_workers
        ):
            raise ValueError(
                "train.non_finite: 'skip' needs whole batches: engine.accumulation = 1 and no "
                "engine.min_workers "
                "(fewer workers take a batch in parts); use 'stop'"
            )
        if self.train.keep_best and not self.train.validate_every:
            raise ValueError(
                "train.keep_best: the best checkpoint has the lowest validation loss; set "
                "train.validate_every"
            )
        if self.engine.min_workers and self.engine.min_workers > self.engine.workers:
            raise ValueError(
                f"engine.min_workers: {self.engine.min_workers} must not exceed engine.workers "
                f"= {self.engine.workers}"
            )
        parts = self.engine.workers * self.engine.accumulation
        if self.train.batch_size % parts:
            raise ValueError(
                f"train.batch_size: {self.train.batch_size} must be divisible by engine.workers x "
                f"engine.accumulation = {parts}"
            )
        return self

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    def placed(self, output: str, corpus: str) -> Self:
        """With these places, and local folders absolute: workers start in other folders."""
        return self.model_copy(update={"output": output, "corpus": corpus})


class Recipe(RunRecipe):
    """One training run of LI-DiT and everything it depends on."""

    sources: tuple[Place, ...] = Field(
        (), description="what `lidit run` ingests when the corpus does not exist"
    )
    ingest: IngestSettings = IngestSettings()
    encoders: tuple[EncoderSettings, ...] = Field(
        min_length=1, description="the LLMs that read the captions"
    )
    pool: PoolSettings = PoolSettings()
    pools: dict[str, PoolSettings] = Field(
        default_factory=dict, description="encoder -> a pool of its own"
    )
    codec: CodecSettings = CodecSettings()
    model: ModelSettings = ModelSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    sampler: SamplerSettings = SamplerSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    plan: PlanSettings = PlanSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        names = [encoder.name for encoder in self.encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"encoders: the names must differ, found {names}")
        if self.train.validate_every and not self.data.validation_fraction:
            raise ValueError(
                "train.validate_every: nothing is held out; set data.validation_fraction"
            )
        if self.objective.kind == "ddpm" and self.sampler.steps > self.objective.train_steps:
            raise ValueError(
                f"sampler.steps: {self.sampler.steps} exceed the {self.objective.train_steps} "
                "noise levels of "
                "objective.train_steps; set fewer steps"
            )
        if unknown := sorted(set(self.pools) - set(names)):
            raise ValueError(
                f"pools: no encoder is called {unknown[0]!r}; encoders: {', '.join(names)}"
            )
        if self.model.fusion.mode == "none" and len(names) != 1:
            raise ValueError(
                f"model.fusion.mode: 'none' takes exactly one encoder, found {len(names)}: {names}"
            )
        apart = [encoder.name for encoder in self.encoders if encoder.keeps_layers_apart]
        # of an ablation's, an arm may read another
        if self.model.layers == "one" and len(apart) == len(names):
            raise ValueError(
                f"model.layers: 'one' reads one state per token, but encoder {apart[0]} keeps "
                "its layers apart; set "
                "mean, learned or per_block, or give the encoder join: concatenate"
            )
        if self.model.layers != "one" and not apart:
            raise ValueError(
                f"model.layers: {self.model.layers!r} needs several layers of a token; give an "
                "encoder layers and "
                "join: separate"
            )
        return self

    def placed(self, output: str, corpus: str) -> Self:
        codec = self.codec.model_copy(update={"model": _absolute(self.codec.model)})
        train = self.train.model_copy(update={"init_from": _absolute(self.train.init_from)})
        return super().placed(output, corpus).model_copy(update={"codec": codec, "train": train})

    def pool_of(self, encoder: str) -> PoolSettings:
        """The pool that computes this encoder's states."""
        return self.pools.get(encoder, self.pool)
