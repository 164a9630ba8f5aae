"""Aligning a model with rewards: `align` is the driver, `align_worker` the loop, `AlignJob` its
parts.

An ordinary training run whose batches are pairs of the model's own pictures (`Rollouts`) and whose
loss compares the two (`lidit.diffusion.alignment`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lidit.codecs import load_codec
from lidit.config import SamplerChanges
from lidit.config.align import Alignment, AlignRecipe
from lidit.data.assembler import TrainingBatch
from lidit.data.captions import CaptionDraws
from lidit.data.rows import Part
from lidit.datasets.scenes.benchmark import benchmark_prompts
from lidit.diffusion import (
    GuidedPredictor,
    build_objective,
    initial_noise,
    sample,
    seeded_generators,
)
from lidit.diffusion.alignment import Pairs, distance, pair_losses
from lidit.errors import InputError
from lidit.evals.rewards.opening import open_reward
from lidit.evals.scenes.evaluation import evaluate_images
from lidit.models import LIDiT, TextStates
from lidit.models.lora import add_lora, merge_lora, require_peft
from lidit.pipeline import LIDiTPipeline
from lidit.pipeline.adapters import save_adapter
from lidit.pixels import unit_to_bytes
from lidit.store import Corpus
from pipelines.evaluation.models import weights_digest
from pipelines.runtime.resources import connect
from pipelines.training.driver import TrainResult, finished_step
from pipelines.training.engine import Engine
from pipelines.training.inherit import check_states, codec_of, shape_of
from pipelines.training.loop import reports_failure
from pipelines.training.rollouts import PairBatch, Rollouts
from pipelines.training.sample_prompts import prompt_states
from pipelines.training.train import TrainingJob, run_facts, train

LORA_FOLDER = "lora"  # of a published model: the adapter alone, beside the merged network

# -- the driver -----------------------------------------------------------------------------------


def align(alignment: Alignment, allow_drift: bool = False) -> TrainResult:
    """Train a model on rewards of its own pictures and publish it, from wherever the run stands.

    Raises InputError, before anything is started, for a start that was trained on other states or
    latents than the corpus has, a reward that cannot be opened, and adapters without peft; JobError
    where the training failed.
    """
    corpus = Corpus.open(alignment.corpus)
    if alignment.lora:
        require_peft()
    open_reward(alignment.reward)
    recipe = align_recipe(alignment)
    prompts = Corpus.open(alignment.prompts) if alignment.prompts else corpus
    for used in (corpus, prompts):
        check_states(Path(recipe.start), used)
    if recipe.watch.every and (finished_step(recipe.run_folder) or 0) < recipe.train.steps:
        placed = recipe.placed(str(recipe.run_folder.resolve().parent), corpus.folder.location)
        connect(cpus=math.ceil(recipe.engine.workers * recipe.engine.cpus_per_worker) + 2)
        watched_states(placed, corpus, run_facts(recipe, corpus)["text"])
    digest = weights_digest(Path(recipe.start))
    tags = {"lidit.job": "align", "lidit.start": digest}
    return train(
        recipe, allow_drift, tags, align_worker, {"start": digest, "captions": prompts.digest}
    )


def align_recipe(alignment: Alignment) -> AlignRecipe:
    """An alignment as the training engine takes it: shape, objective, states and codec are the
    start's.
    """
    start = Path(alignment.start).resolve()
    pipe = LIDiTPipeline.from_pretrained(start)
    if pipe.model.takes_guidance:
        raise InputError(
            f"{start}: its guidance scale is an input, as of a distilled model; align its "
            "teacher instead"
        )
    sampler = alignment.sampler.applied(pipe.sampler)
    # Whole, for it decides what the run learns from; how the published model samples may still be
    # changed.
    drawing = SamplerChanges(**alignment.rollout.sampler.applied(sampler).model_dump())
    return AlignRecipe(
        name=alignment.name,
        output=alignment.output,
        corpus=alignment.corpus,
        encoders=tuple(encoder.settings for encoder in pipe.encoders.values()),
        codec=alignment.codec or codec_of(pipe),
        model=shape_of(pipe.model, alignment.activation_checkpointing),
        objective=pipe.objective.settings,
        data=alignment.data,
        train=alignment.train,
        engine=alignment.engine,
        tracking=alignment.tracking,
        sampler=sampler,
        evaluate=alignment.evaluate,
        start=str(start),
        prompts=alignment.prompts and Corpus.open(alignment.prompts).folder.location,
        align=alignment.align,
        reward=alignment.reward,
        rollout=alignment.rollout.model_copy(update={"sampler": drawing}),
        lora=alignment.lora,
        watch=alignment.watch,
    ).keep_written(alignment.written)


def watched(recipe: AlignRecipe) -> list[dict[str, Any]]:
    """The scene benchmark's prompts that are scored as training goes."""
    size = LIDiTPipeline.from_pretrained(recipe.start, check_files=False).config.height
    return benchmark_prompts(size, recipe.reward.layout, recipe.watch.seed, recipe.watch.per_tag)


def watched_states(
    recipe: AlignRecipe, corpus: Corpus, fingerprints: Mapping[str, str]
) -> dict[str, list[torch.Tensor]]:
    """Their states, encoded on the cluster once and kept in the run's folder, where workers find
    them.
    """
    prompts = tuple(item["prompt"] for item in watched(recipe))
    asked = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"sample_prompts": prompts})}
    )
    return prompt_states(asked, corpus, fingerprints, recipe.run_folder / "prompts")


# -- the loop -------------------------------------------------------------------------------------


@reports_failure
def align_worker(config: dict[str, Any]) -> None:
    """What every worker runs. `config`: as of `train_worker`, with an `AlignRecipe`."""
    job = AlignJob(config)
    try:
        job.watch_if_due()
        for batch in job.batches():
            job.log_round()
            job.take_step(batch)
            job.watch_if_due()
            job.sample_if_due()
            job.save_if_due()
    finally:
        job.metrics.close()


class AlignEngine(Engine):
    """LI-DiT's engine with a loss over pairs."""

    recipe: AlignRecipe

    def loss(self, batch: TrainingBatch) -> torch.Tensor:
        assert isinstance(batch, PairBatch)
        x0, noise, u = batch.both
        t = self.objective.timesteps(u)
        x_t = self.objective.add_noise(x0, noise, t)
        text = {name: states.rounded(self._length_multiple) for name, states in batch.text.items()}
        prediction = self.deepspeed(x_t.to(self.compute_dtype), t, text, batch.rows)
        pairs = Pairs(x0, noise, t, x_t, _rows(batch.drawn), batch.gap)
        loss = pair_losses(self.recipe.align, self.objective, prediction, pairs).mean()
        if self.recipe.align.kl:
            loss = (
                loss
                + self.recipe.align.kl
                * distance(self.objective, prediction, _rows(batch.start), pairs).mean()
            )
        return loss

    def forward(self, batch: TrainingBatch) -> None:
        assert isinstance(batch, PairBatch)
        x0, _, u = batch.both
        self.module(x0.to(next(self.module.parameters()).dtype), u, batch.text, batch.rows)


def _rows(pairs: torch.Tensor) -> torch.Tensor:
    """[B, 2, C, H, W] -> [2 B, C, H, W], the better ones first."""
    return pairs.transpose(0, 1).flatten(0, 1)


class AlignJob(TrainingJob):
    """A training that starts from a model's weights and learns from rewards of what it draws."""

    recipe: AlignRecipe
    reads = AlignRecipe

    def initial(self, recipe: AlignRecipe) -> LIDiT:  # type: ignore[override]
        """The start's network, statistics and all, with an adapter where one is trained."""
        model = super().untrained(recipe)
        model.load_state_dict(_network(recipe).state_dict())
        if recipe.lora:
            torch.manual_seed(recipe.data.seed)
            add_lora(model, recipe.lora)
        return model.train()

    def untrained(self, recipe: AlignRecipe) -> LIDiT:  # type: ignore[override]
        """Averaged adapters are put into a network that has the start's weights below them."""
        return self.initial(recipe) if recipe.lora else super().untrained(recipe)

    def make_engine(self, recipe: AlignRecipe, model: LIDiT, device: torch.device) -> Engine:  # type: ignore[override]
        return AlignEngine(recipe, model, build_objective(recipe.objective), device)

    def _feed(self, engine: Engine, part: Part) -> Rollouts:
        recipe: Any = engine.recipe
        first = None
        if recipe.align.kl:  # every worker holds the start whole
            first = (
                _network(recipe)
                .to(engine.device, engine.compute_dtype)
                .eval()
                .requires_grad_(False)
            )
        prompts = Corpus.open(recipe.prompts) if recipe.prompts else self.corpus
        fingerprints = {name: family.fingerprint for name, family in self.families.texts.items()}
        captions = CaptionDraws(prompts, fingerprints, recipe.data.seed)
        return Rollouts(recipe, engine, captions, self.families.latent_shape, first)

    def log_round(self) -> None:
        """Rewards of a round that was drawn just now."""
        rollouts: Any = self.feed
        if rollouts.fresh:
            self.metrics.log(rollouts.fresh, self.step)
            rollouts.fresh = {}

    def watch_if_due(self) -> None:
        """Strict and lax scores of prompts no round draws, by the averaged weights: what a hacked
        reward spoils.
        """
        watch = self.recipe.watch
        if not watch.every or not (self.step == 0 or self.due(watch.every)):
            return
        model = self.averaged()
        if model is not None:  # rank 0
            self.metrics.log(self._watched(model), self.step)

    @torch.no_grad()
    def _watched(self, model: LIDiT) -> dict[str, float]:
        items = watched(self.recipe)
        device, sampler = self.device, self.recipe.sampler
        rows = watched_states(self.recipe, self.corpus, self.config["facts"]["text"])
        shared = {name: self.families.texts[name].shared() for name in rows}
        empty = {
            name: TextStates.collate([it.empty], it.prefix).to(device)
            for name, it in shared.items()
        }
        images: list[np.ndarray] = []
        codec = load_codec(self.recipe.codec, str(device))
        for first in range(0, len(items), self.recipe.rollout.batch_size):
            last = min(first + self.recipe.rollout.batch_size, len(items))
            text = {
                n: TextStates.collate(all_[first:last], shared[n].prefix).to(device)
                for n, all_ in rows.items()
            }
            noise = initial_noise(
                seeded_generators(range(first, last)), self.families.latent_shape, device
            )
            generators = seeded_generators(range(first, last))
            latents = sample(
                GuidedPredictor(model, text, empty, sampler),
                self.engine.objective,
                noise,
                sampler,
                generators,
            )
            images += list(unit_to_bytes(codec.decode(latents)).permute(0, 2, 3, 1).cpu().numpy())
        floor = dict.fromkeys((item["tag"] for item in items), (0.0, 0.0))
        metrics = evaluate_images(items, ([image] for image in images), floor).metrics()
        named = {"overall/strict": "strict", "overall/lax": "lax"} | {
            f"held_out_{group}/strict{seen}": f"strict_{group}{seen}"
            for group in ("pair", "template")
            for seen in ("", "_seen")
        }
        return {f"watch/{name}": metrics[key] for key, name in named.items() if key in metrics}

    def export(self, folder: Path, model: LIDiT) -> None:
        """The folder people load: an ordinary network, and beside it the adapter it was merged
        with.
        """
        if self.recipe.lora:
            save_adapter(model, folder / LORA_FOLDER)
            merge_lora(model)
        super().export(folder, model)


def _network(recipe: AlignRecipe) -> LIDiT:
    return LIDiT.load(Path(recipe.start) / "model")
