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
from dataclasses import dataclass

from lidit.config import EncoderSettings, OnlineSettings, Recipe
from lidit.models import LIDiT
from lidit.models.flops import forward_flops
from lidit.plan.memory import (
    GPU_SHARE,
    Memory,
    activation_bytes,
    buffer_bytes,
    checkpointing_that_fits,
    state_bytes,
)
from lidit.plan.states import (
    STATE_BITS,
    Run,
    StatesPlan,
    encoders_per_trainer,
    plan_states,
    text_bytes,
)
from lidit.plan.subject import Facts, PlannedEncoder, build_on_meta

LATENT_BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1}
NEIGHBOURS = 3  # units beside its own that a node opens: a batch draws unequally from units


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


def opened_share(recipe: Recipe, nodes: int) -> float:
    """The share of a window's units that a node opens: with `data.sort_by_unit` those of its part
    of a batch and the neighbours at both ends, otherwise all.
    """
    if not recipe.data.sort_by_unit:
        return 1.0
    return min(1.0, 1 / nodes + NEIGHBOURS / recipe.data.window_units)


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
    fetched_bytes_per_second_per_node: float  # of a corpus behind a URL
    cost: float
    states: StatesPlan
    checkpointing: int | None  # of the recipe's stage; see `checkpointing_that_fits`

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
    micro = max(1, batch // (gpus * recipe.engine.accumulation))
    activations = activation_bytes(recipe, facts, micro)
    memory = {
        stage: Memory(
            state_bytes(
                count, stage, gpus, recipe.engine.precision, recipe.engine.accumulation > 1
            ),
            buffer_bytes(count, stage, recipe.engine.precision, gpus > 1),
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
    held = memory[recipe.engine.zero_stage]
    room = GPU_SHARE * 1e9 * setting.gpu_gigabytes - held.states - held.buffers
    families = {
        encoder.name: {
            storage: family_bytes(facts.captions, recipe, facts, encoder, storage)
            for storage in STATE_BITS
        }
        for encoder in recipe.encoders
    }
    nodes = max(1, math.ceil(gpus / setting.gpus_per_node))
    # Of states the rows that are used are fetched, of latents whole units.
    text, opened = sample_text_bytes(recipe, facts), opened_share(recipe, nodes)
    return Plan(
        parameters=count,
        steps=recipe.train.steps,
        epochs=batch * recipe.train.steps / facts.samples,
        memory=memory,
        flops_per_step=flops,
        seconds_per_step=seconds,
        train_gpu_hours=train,
        embed_gpu_hours=embed,
        text_bytes=families,
        latent_bytes=latent_bytes(
            facts.samples, facts.latent, facts.latent_storage, facts.posterior
        ),
        bytes_per_sample=text + latent,
        read_bytes_per_second_per_node=(text + latent) * batch / seconds / nodes,
        fetched_bytes_per_second_per_node=(text / nodes + latent * opened) * batch / seconds,
        cost=(train + sum(embed.values())) * setting.price_per_gpu_hour,
        states=_states(recipe, facts, train, sum(embed.values()), batch / seconds),
        checkpointing=checkpointing_that_fits(recipe, facts, micro, room),
    )


def _states(
    recipe: Recipe, facts: Facts, train: float, embed: float, samples_per_second: float
) -> StatesPlan:
    """Where the states should live. train, embed: GPU-hours; samples_per_second: of
    the whole run.
    """
    setting, online = recipe.plan, recipe.online or OnlineSettings()
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
