"""Training LI-DiT: `train` is the driver, `train_worker` the loop, `TrainingJob` its parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lidit.codecs import load_codec
from lidit.config import Recipe
from lidit.data.assembler import TrainingBatch
from lidit.data.credit import CreditKeeper, credit_of
from lidit.data.families import Families, stored_layers
from lidit.data.feed import Batches, open_feed
from lidit.data.matching import matching_family, matching_latents
from lidit.data.rows import Part, Rows, require_held_out
from lidit.diffusion import build_objective
from lidit.models import LIDiT
from lidit.models.mixture import check_layers
from lidit.pipeline import PipelineSettings, save_pipeline
from lidit.pipeline.checksums import check_model
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.store import Corpus
from pipelines.evaluation.models import read_index
from pipelines.training.drift import FREE_ENGINE, settings_facts
from pipelines.training.driver import TrainResult, open_run
from pipelines.training.engine import Engine, set_up_device
from pipelines.training.loop import TrainingLoop, TrainWorker, reports_failure
from pipelines.training.partition import is_partitioned
from pipelines.training.sample_prompts import prompt_states, sample_grid
from pipelines.training.validation import validation_loss

log = logging.getLogger(__name__)
# Settings that decide where and how fast a run goes, never what it computes.
FREE_SETTINGS = {
    "output": ..., "sources": ..., "ingest": ..., "pool": ..., "pools": ..., "sampler": ...,
    "evaluate": ..., "card": ...,
    "tracking": ..., "plan": ..., "teacher": ..., "online": ...,
    "start": ..., "prompts": ..., "watch": ...,
    "corpus": ..., "encoders": ..., "codec": ...,  # their fingerprints are facts of their own
    "engine": FREE_ENGINE,
    "model": {"checkpointed_every"},
    "data": {"prefetch_batches", "readers"},
    "train": {"checkpoint_every", "keep_checkpoints", "keep_best", "async_upload", "log_every",
              "sample_every",
              "sample_prompts", "validate_every", "validation_samples"},
}  # fmt: skip


# -- the driver -----------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    allow_drift: bool = False,
    tags: Mapping[str, str] | None = None,
    worker: TrainWorker | None = None,
    lineage: Mapping[str, str] | None = None,
) -> TrainResult:
    """Train a recipe's model to its last step and publish it, from wherever its run stands.

    The corpus, its text families and its latents must be there. After an interruption the same call
    goes on from the last checkpoint; after the last step it does nothing.

    Args:
        recipe: What `load_recipe` returns. Results go to its `output` and `name`: OUTPUT/NAME.
        allow_drift: Continue a run although settings or data are not those it was started with.
        tags: Tags for the run in the tracker, besides its own or in their place.
        worker: Runs on every worker in place of `train_worker`, with the same config: of a training
            whose loss is another.
        lineage: Facts of the run besides recipe and corpus, such as the digest of a model that it
            learns from.

    Returns:
        `model`, the folder that `LIDiTPipeline.from_pretrained` reads; `step`, the last step;
        `tracking_uri` and `run_id` of the run in MLflow; `trained`, False where the run was
        finished before the call.

    Raises:
        InputError: Before anything is started: a family is missing or was made with other settings,
            the held-out
            samples fill no batch, the machine lacks what the recipe asks for, or the run has
            drifted.
        JobError: The training failed; its checkpoints are kept.
    """
    corpus = Corpus.open(recipe.corpus)
    facts = {**run_facts(recipe, corpus), **(lineage or {})}
    if recipe.train.validate_every:
        require_held_out(corpus, recipe.data, recipe.train.batch_size)

    with open_run(recipe, corpus, facts, {**_tags(facts), **(tags or {})}, allow_drift) as run:
        if not run.finished:
            if recipe.train.init_from:
                check_model(Path(recipe.train.init_from))
            prompts = prompt_states(run.recipe, corpus, facts["text"], run.folder / "prompts")
            run.launch(worker or train_worker, {"facts": facts, "prompts": prompts})
            run.publish_model()

    if not run.trained:
        _warn_of_another_sampler(recipe, run.result.model)
    return run.result


def run_facts(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """What a run is made of: config, corpus digest, family fingerprints.

    Raises InputError for a family that is missing or was made with other settings, for layers that
    the model does not read, and for a codec that is none.
    """
    texts = {encoder.name: matching_family(corpus, encoder) for encoder in recipe.encoders}
    check_layers(recipe.model.layers, stored_layers(texts))
    config = settings_facts(recipe, FREE_SETTINGS)
    if recipe.model.layers == "one":  # runs of earlier releases, which had no other, go on
        del config["model"]["layers"]
    return {
        "config": config,
        "corpus": corpus.digest,
        "text": {name: family.fingerprint for name, family in sorted(texts.items())},
        "latents": matching_latents(corpus, recipe.codec),
    }


def _tags(facts: Mapping[str, Any]) -> dict[str, str]:
    texts = {f"lidit.text.{name}": fingerprint for name, fingerprint in facts["text"].items()}
    return {"lidit.job": "train", "lidit.latents": facts["latents"], **texts}


def _warn_of_another_sampler(recipe: Recipe, model: Path) -> None:
    if read_index(model)["sampler"] != recipe.sampler.model_dump(mode="json"):
        log.warning(
            "%s keeps the sampler it was published with; give lidit evaluate sampler.steps=... or "
            "sampler.guidance_scale=..., and lidit sample --steps or --guidance", model
        )  # fmt: skip


# -- the loop -------------------------------------------------------------------------------------


@reports_failure
def train_worker(config: dict[str, Any]) -> None:
    """What every worker runs. `config`: recipe, facts, prompt states, tracking handle, board."""
    take_all_steps(TrainingJob(config))


def take_all_steps(job: TrainingJob) -> None:
    """From where the run stands to its last step."""
    try:
        for batch in job.batches():
            job.take_step(batch)
            job.sample_if_due()
            job.validate_if_due()
            job.save_if_due()
    finally:
        job.close()


class TrainingJob(TrainingLoop[TrainingBatch, LIDiT]):
    """One worker's data, engine and position. Steps and checkpoints are `TrainingLoop`'s.

    A training with another loss is a job of its own that says which recipe it reads, which network
    it starts from and which engine takes its steps.
    """

    recipe: Recipe
    engine: Engine
    reads: type[Recipe] = Recipe

    def __init__(self, config: dict[str, Any]) -> None:
        recipe, facts = self.reads.model_validate(config["recipe"]), config["facts"]
        device = set_up_device(recipe.engine)

        # The families are named by fingerprint: the corpus may have others of the same name.
        self.corpus = Corpus.open(recipe.corpus)
        self.families = Families.open(self.corpus, recipe.data, facts["latents"], facts["text"])

        # Another training's network may not know its families' codes: then states are read as
        # states. (Shared states are read here, where no default device is set.)
        coded = [name for name, family in self.families.texts.items() if family.has_steps]
        model = self.network(recipe)
        self.coded = all(model.conditioner.knows_code(name) for name in coded)
        engine = self.make_engine(recipe, model, device)
        fresh = self.untrained(recipe) if engine.rank == 0 else None
        super().__init__(config, engine, self._feed(engine, "train"), fresh)
        self.credit = (
            self._give_credit(recipe) if engine.rank == 0 and self.families.rolling else None
        )

    def _give_credit(self, recipe: Recipe) -> CreditKeeper:
        """Tell the producers of rolling families where this run stands, from now on."""
        credit = replace(credit_of(recipe, self.corpus), step=self.step, checkpoint=self.step)
        # An order of its own: the feed's has caches that its threads use.
        order = Rows(self.corpus, recipe.data).order(recipe.train.batch_size)
        folders = [family.folder for family in self.families.rolling]
        return CreditKeeper(
            folders, credit, order.window_of, min(f.patience for f in self.families.rolling)
        )

    def take_step(self, batch: TrainingBatch) -> None:
        began = time.perf_counter()
        super().take_step(batch)
        if self.credit is not None:
            self.credit.advance(self.step, time.perf_counter() - began)

    def save(self) -> None:
        before = self.saved
        super().save()
        if not self.families.rolling:
            return
        # Units are deleted up to the newest checkpoint that is complete: on every worker, and
        # uploaded.
        dist.barrier()
        if self.credit is not None:
            behind = self.recipe.train.async_upload and self.step < self.recipe.train.steps
            self.credit.saved(before if behind else self.step)

    def close(self) -> None:
        """The metrics' and the credit's last word."""
        self.metrics.close()
        if self.credit is not None:
            self.credit.close()

    def untrained(self, recipe: Recipe) -> LIDiT:
        """A network of the recipe's shape, for weights that are put into it."""
        return untrained_model(recipe, self.families)

    def network(self, recipe: Recipe) -> LIDiT:
        """The network before the first step; where rank 0 gives every rank its share, without
        numbers elsewhere.
        """
        if dist.get_rank() == 0 or not is_partitioned(recipe.engine):
            return self.initial(recipe)
        with torch.device("meta"):
            return self.untrained(recipe).train()

    def initial(self, recipe: Recipe) -> LIDiT:
        """The network before the first step."""
        return initial_model(recipe, self.families)

    def make_engine(self, recipe: Recipe, model: LIDiT, device: torch.device) -> Engine:
        """What takes steps; its loss is what the training is about."""
        return Engine(recipe, model, build_objective(recipe.objective), device)

    def _feed(self, engine: Engine, part: Part) -> Batches[TrainingBatch]:
        """This worker's part of the global batches; without history, so it begins at any step."""
        return open_feed(
            self.corpus,
            engine.recipe.data,
            batch_size=engine.recipe.train.batch_size,
            part=part,
            rank=engine.rank,
            world_size=engine.world_size,
            families=self.families,
            coded=self.coded,
        )

    def sample_if_due(self) -> None:
        """A grid of the sample prompts by the averaged weights; always after the last step."""
        settings = self.recipe.train
        if not settings.sample_prompts or not (
            self.step == settings.steps or self.due(settings.sample_every)
        ):
            return
        model = self.averaged()
        if model is None:  # another rank
            return
        # On a GPU in bfloat16, as later; its memory is the training's again after the grid. Not by
        # diffusers' `to`, which warns of statistics that stay in float32 by themselves.
        torch.nn.Module.to(
            model, self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32
        )
        path = self.recipe.run_folder / "samples" / f"step-{self.step:09}.png"
        sample_grid(
            model, self.engine.objective, self.recipe, self.config["prompts"], self.families, path
        )
        if self.metrics.tracker:
            self.metrics.tracker.image(path, "samples", self.step)

    def validate_if_due(self) -> None:
        """The loss on the held-out samples, which no step trains on."""
        if self.due(self.recipe.train.validate_every) and self.recipe.data.validation_fraction:
            losses = validation_loss(
                self.engine, self._held_out, self.feed.start, self.recipe.data.seed
            )
            self.metrics.log(losses, self.step)

    @cached_property
    def _held_out(self) -> list[TrainingBatch]:
        """This worker's part of the validation batches, read once."""
        feed, settings = self._feed(self.engine, "validation"), self.recipe.train
        count = max(1, settings.validation_samples // settings.batch_size)
        return list(feed.batches(0, min(count, feed.steps_per_epoch)))

    def export(self, folder: Path, model: LIDiT) -> None:
        """The folder people load: EMA weights, encoder specs with their shared states, codec,
        settings.
        """
        factor, texts = load_codec(self.recipe.codec).factor, self.families.texts
        _, height, width = self.families.latent_shape
        save_pipeline(
            folder,
            model,
            encoders=[
                ModelEncoder.of_family(encoder, texts[encoder.name])
                for encoder in self.recipe.encoders
            ],
            settings=PipelineSettings(
                self.recipe.objective,
                self.recipe.sampler,
                self.recipe.codec,
                height=height * factor,
                width=width * factor,
            ),
            facts={
                **self.config["facts"],
                "prompts": list(self.recipe.train.sample_prompts),
                "license": self.recipe.card.license,
                "datasets": list(self.recipe.card.datasets),
            },
        )


def untrained_model(recipe: Recipe, families: Families) -> LIDiT:
    """The recipe's model for the families' widths, latents and codes."""
    model = LIDiT.from_settings(
        recipe.model, families.widths, families.latent_shape[0], families.stored_layers
    )
    for name, family in families.texts.items():
        if family.has_steps:
            code = family.shared().code
            model.conditioner.set_code(name, code.back if code else None)
    return model


def initial_model(recipe: Recipe, families: Families) -> LIDiT:
    """The model before the first step: weights by seed or `train.init_from`, with statistics."""
    torch.manual_seed(recipe.data.seed)
    model = untrained_model(recipe, families)
    if recipe.train.init_from:
        model.load_state_dict(LIDiT.load(Path(recipe.train.init_from) / "model").state_dict())
    # Last: of these very families, whatever the weights were trained on before.
    for name, family in families.texts.items():
        shared = family.shared()
        model.conditioner.set_statistics(name, shared.mean, shared.deviation)
    return model.train()
