"""What a run will need, worked out before anything is spent: memory, arithmetic, storage,
bandwidth, money.

Nothing here reads a file or starts a job. Every formula is held by a test to what a small real run
measures: FLOPs to torch's counter, bytes on disk to written families, memory to the tensors an
engine keeps.

Symbols: P parameters, N workers, B samples of one micro-batch, T caption tokens, W width of an LLM,
D of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lidit.config import EncoderSettings, EncoderShape, ModelSettings, OnlineSettings, Recipe
from lidit.models import LIDiT, TextStates
from lidit.models.flops import forward_flops
from lidit.plan.states import (
    STATE_BITS,
    Run,
    StatesPlan,
    encoders_per_trainer,
    plan_states,
    text_bytes,
)

LATENT_BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1}
# In elements, DeepSpeed's defaults: gradients reduced together, and gathered parameters ZeRO-3 may
# keep for reuse.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class PlannedEncoder:
    """An LLM of `shape` of which `blocks` run. `width`: of a stored token, `layers` of which are
    kept apart; `pooled`: of a caption's own vector.
    """

    shape: EncoderShape
    blocks: int
    width: int
    layers: int = 1
    pooled: int = 0


@dataclass(frozen=True)
class Facts:
    """What a plan is about, measured from a corpus or assumed in the recipe.

    `caption_tokens`, `prefix_tokens`: mean per caption, and once per encoder. `latent`: (channels,
    height, width).
    `repeated`: share of the captions that an earlier unit holds, too.
    """

    samples: int
    captions: int
    caption_tokens: Mapping[str, float]
    prefix_tokens: Mapping[str, int]
    encoders: Mapping[str, PlannedEncoder]
    latent: tuple[int, int, int]
    latent_storage: str
    posterior: bool
    # per value, of encoders whose coded states are there
    coded_bits: Mapping[str, float] = field(default_factory=dict)
    repeated: float | None = None

    def __post_init__(self) -> None:
        if self.captions < self.samples or min(self.samples, *self.latent) < 1:
            raise ValueError(
                f"a plan needs samples with at least one caption each and latents: {self}"
            )


def build_on_meta(settings: ModelSettings, facts: Facts) -> LIDiT:
    """The model without its numbers."""
    with torch.device("meta"):
        widths = {name: encoder.width for name, encoder in facts.encoders.items()}
        layers = {name: encoder.layers for name, encoder in facts.encoders.items()}
        return LIDiT.from_settings(settings, widths, facts.latent[0], layers)


# -- memory ----------------------------------------------------------------------------------------


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


def state_bytes(count: int, stage: int, workers: int, precision: str) -> float:
    """Weights, gradients and everything the optimizer and the average keep for P = `count`, on one
    worker.

    ZeRO keeps master weights even in float32. Stage 0 has none: bfloat16 is then autocast over
    float32 weights. Stage 1 holds whole gradients and, while they are averaged, its own share of
    them again.
    """
    share = count / workers
    low = 4 if precision == "float32" or stage == 0 else 2
    weights = low * (share if stage == 3 else count)
    gradients = low * {0: count, 1: count + share}.get(stage, share)
    master = 4 * share if stage else 0
    moments = 8 * (share if stage else count)
    average = 4 * share
    return weights + gradients + master + moments + average


def buffer_bytes(count: int, stage: int, precision: str) -> float:
    """What DeepSpeed holds for communication: a bucket of gradients, and under stage 3 gathered
    parameters.
    """
    low = 4 if precision == "float32" else 2
    if stage < 2:
        return 0.0
    return low * (min(count, REDUCE_BUCKET) + (min(count, LIVE_PARAMETERS) if stage == 3 else 0))


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


# -- arithmetic ------------------------------------------------------------------------------------


def step_flops(model: LIDiT, facts: Facts, batch_size: int) -> float:
    """FLOPs of one optimizer step: three forward passes; recomputation by activation checkpointing
    is not counted.
    """
    tokens = {name: max(1, round(count)) for name, count in facts.caption_tokens.items()}
    forward = forward_flops(model, facts.latent[1:], tokens, facts.prefix_tokens)
    return 3.0 * batch_size * sum(forward.values())


def embedding_flops(encoder: PlannedEncoder, tokens: float, prefix: int, length: float) -> float:
    """FLOPs of the states of `tokens` caption tokens in captions of mean `length`, the prefix
    computed once.

    Several layers are read in one pass.
    """
    # scores and weighted sums over what a token sees
    attention = 4.0 * encoder.shape.width * (prefix + length / 2)
    return tokens * encoder.blocks * (2.0 * encoder.shape.block_parameters + attention)


def gpu_hours(flops: float, tflops: float, utilisation: float) -> float:
    return flops / (tflops * 1e12 * utilisation) / 3600


# -- storage ---------------------------------------------------------------------------------------


def latent_bytes(
    samples: int, latent: tuple[int, int, int], storage: str, posterior: bool
) -> float:
    """Bytes of a latents family's unit files; with a posterior mean and deviation
    are both there.
    """
    copies = 2 if posterior else 1
    row = 4 + (4 + 12) + 16 + 8 * copies  # tokens, shape, crop, offsets
    return samples * (copies * math.prod(latent) * LATENT_BYTES[storage] + row)


def sample_text_bytes(recipe: Recipe, facts: Facts, storage: str | None = None) -> float:
    """Bytes of one caption's states of all encoders; None: each encoder's own storage."""
    return sum(
        family_bytes(1, recipe, facts, encoder, storage or _storage(encoder))
        for encoder in recipe.encoders
    )


def family_bytes(
    captions: int, recipe: Recipe, facts: Facts, encoder: EncoderSettings, storage: str
) -> float:
    """`text_bytes` of one of a plan's encoders."""
    planned, tokens = facts.encoders[encoder.name], facts.caption_tokens[encoder.name]
    bits = (
        facts.coded_bits.get(encoder.name, recipe.plan.coded_bits) if storage == "coded" else None
    )
    return text_bytes(captions, tokens, planned.width, storage, planned.pooled, bits)


def _storage(encoder: EncoderSettings) -> str:
    """`compute` means bfloat16 here: plans are made for GPUs."""
    return "bfloat16" if encoder.storage == "compute" else encoder.storage


# -- the whole -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Bytes, FLOPs, hours and money of a recipe. Money is in the unit of
    `plan.price_per_gpu_hour`.
    """

    parameters: int
    steps: int
    epochs: float
    memory: dict[int, Memory]  # per ZeRO stage
    flops_per_step: float
    seconds_per_step: float
    train_gpu_hours: float
    embed_gpu_hours: dict[str, float]
    text_bytes: dict[str, dict[str, float]]  # encoder -> storage dtype -> bytes
    latent_bytes: float
    bytes_per_sample: float
    read_bytes_per_second_per_node: float
    cost: float
    states: StatesPlan

    @property
    def train_days(self) -> float:
        return self.seconds_per_step * self.steps / 86400


def make_plan(recipe: Recipe, facts: Facts) -> Plan:
    """Everything `lidit plan` prints. Workers are GPUs: `plan.gpus`, or the recipe's own number of
    workers.
    """
    setting, batch = recipe.plan, recipe.train.batch_size
    gpus = setting.gpus or recipe.engine.workers
    model = build_on_meta(recipe.model, facts)
    count = model.num_parameters()
    activations = activation_bytes(
        recipe, facts, max(1, batch // (gpus * recipe.engine.accumulation))
    )
    memory = {
        stage: Memory(
            state_bytes(count, stage, gpus, recipe.engine.precision),
            buffer_bytes(count, stage, recipe.engine.precision),
            activations,
        )
        for stage in range(4)
    }
    flops = step_flops(model, facts, batch)
    train = gpu_hours(flops * recipe.train.steps, setting.peak_tflops, setting.mfu)
    seconds = gpu_hours(flops, setting.peak_tflops, setting.mfu) * 3600 / gpus
    embed = {}
    for encoder in recipe.encoders:
        length = facts.caption_tokens[encoder.name]
        needed = embedding_flops(
            facts.encoders[encoder.name],
            facts.captions * length,
            facts.prefix_tokens[encoder.name],
            length,
        )
        embed[encoder.name] = gpu_hours(needed, setting.peak_tflops, setting.embed_mfu)
    latent = latent_bytes(1, facts.latent, facts.latent_storage, facts.posterior)
    per_sample = sample_text_bytes(recipe, facts) + latent
    nodes = max(1, math.ceil(gpus / setting.gpus_per_node))
    return Plan(
        parameters=count,
        steps=recipe.train.steps,
        epochs=batch * recipe.train.steps / facts.samples,
        memory=memory,
        flops_per_step=flops,
        seconds_per_step=seconds,
        train_gpu_hours=train,
        embed_gpu_hours=embed,
        text_bytes={
            encoder.name: {
                storage: family_bytes(facts.captions, recipe, facts, encoder, storage)
                for storage in STATE_BITS
            }
            for encoder in recipe.encoders
        },
        latent_bytes=latent_bytes(
            facts.samples, facts.latent, facts.latent_storage, facts.posterior
        ),
        bytes_per_sample=per_sample,
        read_bytes_per_second_per_node=per_sample * batch / seconds / nodes,
        cost=(train + sum(embed.values())) * setting.price_per_gpu_hour,
        states=_states(recipe, facts, train, sum(embed.values()), batch / seconds),
    )


def _states(
    recipe: Recipe, facts: Facts, train: float, embed: float, samples_per_second: float
) -> StatesPlan:
    """Where the states should live. train, embed: GPU-hours; samples_per_second: of
    the whole run.
    """
    setting, online = recipe.plan, OnlineSettings()
    samples = recipe.train.batch_size * recipe.train.steps
    window = recipe.data.window_units * recipe.ingest.unit_samples
    storages = {_storage(encoder) for encoder in recipe.encoders}
    run = Run(
        epochs=samples / facts.samples,
        embed_cost=embed * setting.price_per_gpu_hour,
        train_cost=train * setting.price_per_gpu_hour,
        sizes={
            name: facts.captions * sample_text_bytes(recipe, facts, name) for name in STATE_BITS
        },
        # Encoders of several storages are compared at the widest of theirs.
        storage=max(storages, key=lambda name: STATE_BITS[name]),
        window=window / facts.samples,
        ahead=online.ahead,
        keep=online.keep,
        months=setting.months,
        price_per_terabyte_month=setting.price_per_terabyte_month,
        unit_seconds=3600 * embed / facts.samples * recipe.ingest.unit_samples,
        window_seconds=window / samples_per_second,
    )
    nodes = max(1, math.ceil((setting.gpus or recipe.engine.workers) / setting.gpus_per_node))
    read = {
        name: sample_text_bytes(recipe, facts, name) * samples_per_second / nodes / 1e9
        for name in STATE_BITS
    }
    return plan_states(run, encoders_per_trainer(embed / facts.samples, train / samples), read)
