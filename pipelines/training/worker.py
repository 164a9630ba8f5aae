"""What every training worker runs: set up, restore, step, save. Started by `pipelines.training.train` on Ray Train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lidit.codecs import load_codec
from lidit.config import Recipe
from lidit.data.assembler import TrainingBatch
from lidit.data.families import Families
from lidit.data.feed import Feed, open_feed
from lidit.data.rows import Part
from lidit.diffusion import build_objective
from lidit.models import LIDiT
from lidit.pipeline import save_pipeline
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.store import Corpus
from pipelines.training.engine import Engine
from pipelines.training.loop import TrainingLoop, attempt
from pipelines.training.metrics import averaged_model, draw_prompts, validation_loss


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry. `config`: recipe, facts, tracking handle, progress board, prompt states (see `fit`)."""
    attempt(_train, config)


def _train(config: dict[str, Any]) -> None:
    job = TrainingJob(config)
    try:
        for batch in job.batches():
            job.take_step(batch)
            job.sample_if_due()
            job.validate_if_due()
            job.save_if_due()
    finally:
        job.watch.close()


class TrainingJob(TrainingLoop[TrainingBatch, LIDiT]):
    """One worker's data, engine and position."""

    engine: Engine

    def __init__(self, config: dict[str, Any]) -> None:
        self.recipe = recipe = Recipe.model_validate(config["recipe"])
        super().__init__(config, recipe)

        self.corpus = Corpus.open(recipe.corpus)
        facts = config["facts"]
        self.families = Families.open(self.corpus, recipe.data, facts["latents"], facts["text"])
        self.shape = self.families.latent_shape

        engine = Engine(recipe, self._model(), build_objective(recipe.objective), self.device)
        fresh = LIDiT.from_settings(recipe.model, self.families.widths, self.shape[0]) if self.rank == 0 else None
        self.begin(engine, self._feed("train"), fresh)

    # -- set up -------------------------------------------------------------------------------------------------------

    def _feed(self, part: Part) -> Feed[TrainingBatch]:
        return open_feed(
            self.corpus,
            self.recipe.data,
            batch_size=self.recipe.train.batch_size,
            part=part,
            rank=self.rank,
            world_size=self.world_size,
            families=self.families,
        )

    def _model(self) -> LIDiT:
        torch.manual_seed(self.recipe.data.seed)
        model = LIDiT.from_settings(self.recipe.model, self.families.widths, self.shape[0])
        if self.recipe.train.init_from:
            source = LIDiT.load(Path(self.recipe.train.init_from) / "model")
            model.load_state_dict(source.state_dict())
        for name, family in self.families.texts.items():
            shared = family.shared()
            model.conditioner.set_statistics(name, shared.mean, shared.deviation)
        return model.train()

    # -- the loop's parts ---------------------------------------------------------------------------------------------

    def sample_if_due(self) -> None:
        last = self.step == self.recipe.train.steps
        if not self.recipe.train.sample_prompts or not (last or self.due(self.recipe.train.sample_every)):
            return
        model = averaged_model(self.engine, self.fresh)
        if model is not None:
            path = self.recipe.run_folder / "samples" / f"step-{self.step:09}.png"
            path.parent.mkdir(exist_ok=True)
            draw_prompts(
                self.engine, model, self.recipe, self.config["prompts"],
                {name: family.shared().empty for name, family in self.families.texts.items()},
                {name: family.shared().prefix for name, family in self.families.texts.items()},
                self.shape, load_codec(self.recipe.codec), path,
            )  # fmt: skip
            if self.watch.tracker:
                self.watch.tracker.artifact(path, "samples")

    def validate_if_due(self) -> None:
        if self.due(self.recipe.train.validate_every) and self.recipe.data.validation_fraction:
            losses = validation_loss(self.engine, self._validation_batches(), self.feed.start, self.recipe.data.seed)
            self.watch.metrics(losses, self.step)

    def _validation_batches(self) -> list[TrainingBatch]:
        if not hasattr(self, "_held_out"):
            feed = self._feed("validation")
            count = max(1, self.recipe.train.validation_samples // self.recipe.train.batch_size)
            self._held_out = list(feed.batches(0, min(count, feed.steps_per_epoch)))
        return self._held_out

    def export(self, folder: Path, model: LIDiT) -> None:
        """The folder people load: EMA weights, encoder specs with their shared states, codec, settings."""
        factor = load_codec(self.recipe.codec).factor
        save_pipeline(
            folder,
            model,
            encoders=[
                ModelEncoder.of_family(encoder, self.families.texts[encoder.name]) for encoder in self.recipe.encoders
            ],
            objective=self.recipe.objective,
            sampler=self.recipe.sampler,
            codec=self.recipe.codec,
            size=(self.shape[1] * factor, self.shape[2] * factor),
            facts=self.config["facts"],
        )
