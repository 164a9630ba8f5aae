"""What every training worker runs: set up, restore, step, save. Started by `pipelines.training.train` on Ray Train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lidit.codecs import load_codec
from lidit.config import Recipe
from lidit.data.feed import Assembler, Feed, TrainingBatch
from lidit.data.order import Order
from lidit.data.rows import Rows
from lidit.diffusion import build_objective
from lidit.models import LIDiT
from lidit.pipeline import save_pipeline
from lidit.pipeline.model_encoder import ModelEncoder
from lidit.store import Corpus, LatentFamily, TextFamily
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
        self.texts: dict[str, TextFamily] = {
            name: self.corpus.text_family(fingerprint) for name, fingerprint in config["facts"]["text"].items()
        }
        self.latents: LatentFamily = self.corpus.latent_family(config["facts"]["latents"])
        self.shape = self.latents.shapes(0)[0]

        self.assembler, feed = self._feed("train")
        engine = Engine(recipe, self._model(), build_objective(recipe.objective), self.device)
        fresh = LIDiT.from_settings(recipe.model, self._widths(), self.shape[0]) if self.rank == 0 else None
        self.begin(engine, feed, fresh)

    # -- set up -------------------------------------------------------------------------------------------------------

    def _widths(self) -> dict[str, int]:
        return {name: family.width for name, family in self.texts.items()}

    def _feed(self, part: str) -> tuple[Assembler, Feed[TrainingBatch]]:
        settings = self.recipe.data
        rows = Rows(self.corpus, settings, part)
        size = self.recipe.train.batch_size
        order = Order(rows.counts, rows.buckets_of, size, settings.seed, settings.window_units)
        assembler = Assembler(self.corpus, self.latents, self.texts, rows, settings)
        return assembler, Feed(order, assembler, self.rank, self.world_size, settings.prefetch_batches)

    def _model(self) -> LIDiT:
        torch.manual_seed(self.recipe.data.seed)
        model = LIDiT.from_settings(self.recipe.model, self._widths(), self.shape[0])
        if self.recipe.train.init_from:
            source = LIDiT.load(Path(self.recipe.train.init_from) / "model")
            model.load_state_dict(source.state_dict())
        for name, family in self.texts.items():
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
                self.engine, model, self.recipe, self.config["prompts"], self.assembler.empty, self.assembler.prefix,
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
            _, feed = self._feed("validation")
            count = max(1, self.recipe.train.validation_samples // self.recipe.train.batch_size)
            self._held_out = list(feed.batches(0, min(count, feed.order.batches_before(1))))
        return self._held_out

    def export(self, folder: Path, model: LIDiT) -> None:
        """The folder people load: EMA weights, encoder specs with their shared states, codec, settings."""
        factor = load_codec(self.recipe.codec).factor
        save_pipeline(
            folder,
            model,
            encoders=[ModelEncoder.of_family(encoder, self.texts[encoder.name]) for encoder in self.recipe.encoders],
            objective=self.recipe.objective,
            sampler=self.recipe.sampler,
            codec=self.recipe.codec,
            size=(self.shape[1] * factor, self.shape[2] * factor),
            facts=self.config["facts"],
        )
