"""What every training worker runs: set up, restore, step, save. Started by `pipelines.fit` on Ray Train."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train as rt
import torch
import torch.distributed as dist

from lidit.codecs import load_codec
from lidit.config import Recipe
from lidit.data.feed import Assembler, Feed, TrainingBatch
from lidit.data.order import Order
from lidit.data.rows import Rows
from lidit.diffusion import build_objective
from lidit.errors import InputError, JobError
from lidit.models import LIDiT
from lidit.pipeline import save_pipeline
from lidit.prompts import ModelEncoder
from lidit.store import Corpus, LatentFamily, TextFamily
from pipelines import checkpoints
from pipelines.engine import Engine
from pipelines.watch import Watch, averaged_model, draw_prompts, validation_loss


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry. `config`: recipe, facts, tracking handle, progress board, prompt states (see `fit`)."""
    job = TrainingJob(config)
    try:
        for batch in job.feed.batches(job.step, job.recipe.train.steps):
            job.take_step(batch)
            job.sample_if_due()
            job.validate_if_due()
            job.save_if_due()
    finally:
        job.watch.close()


class TrainingJob:
    """One worker's data, engine and position."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.recipe = config, Recipe.model_validate(config["recipe"])
        recipe, context = self.recipe, rt.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, int(recipe.engine.cpus_per_worker)))

        self.corpus = Corpus.open(recipe.corpus)
        self.texts: dict[str, TextFamily] = {
            name: self.corpus.text_family(fingerprint) for name, fingerprint in config["facts"]["text"].items()
        }
        self.latents: LatentFamily = self.corpus.latent_family(config["facts"]["latents"])
        self.shape = self.latents.shapes(0)[0]

        self.assembler, self.feed = self._feed("train")
        self.objective = build_objective(recipe.objective)
        self.engine = Engine(recipe, self._model(), self.objective, self.device)
        if config["board"] is not None:
            os.environ.update(ray.get(config["board"].credentials.remote()))
        self.watch = Watch(recipe, self.engine, self.feed, config["tracking"], config["board"])
        self.fresh = LIDiT.from_settings(recipe.model, self._widths(), self.shape[0]) if self.rank == 0 else None
        self.step, self.waited = self._restore(), 0.0

    # -- set up -------------------------------------------------------------------------------------------------------

    def _widths(self) -> dict[str, int]:
        return {name: family.width for name, family in self.texts.items()}

    def _feed(self, part: str) -> tuple[Assembler, Feed]:
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
            source = LIDiT.from_pretrained(Path(self.recipe.train.init_from) / "model")
            model.load_state_dict(source.state_dict())
        for name, family in self.texts.items():
            shared = family.shared()
            model.conditioner.set_statistics(name, shared.mean, shared.deviation)
        return model.train()

    def _restore(self) -> int:
        """The step to go on with: after the newest whole checkpoint, the same one on every rank."""
        found: list[str | None] = [None]
        if self.rank == 0 and (folder := checkpoints.newest_complete(self.recipe.run_folder)):
            found = [str(folder)]
        dist.broadcast_object_list(found)
        if found[0] is None:
            return 0
        position = checkpoints.CheckpointReader(Path(found[0])).restore(self.engine.deepspeed, self.engine.ema)
        return position.step

    # -- the loop's parts ---------------------------------------------------------------------------------------------

    def take_step(self, batch: TrainingBatch) -> None:
        began = time.perf_counter()
        moved = batch.to(self.device)
        if self.watch.flops_per_step is None:
            self.watch.count_flops(moved)
        result = self.engine.train_step(moved)
        if not result.finite:
            self._not_finite(batch, result.loss)
        self.step = batch.step + 1
        wait, self.waited = self.feed.waited - self.waited, self.feed.waited
        self.watch.step(batch, result, time.perf_counter() - began + wait, wait)

    def _not_finite(self, batch: TrainingBatch, loss: float) -> None:
        path = self.recipe.run_folder / f"not-finite-{batch.step:09}-rank{self.rank}.json"
        path.write_text(json.dumps({"step": batch.step, "loss": str(loss), "keys": batch.keys}, indent=1))
        if self.recipe.train.non_finite == "stop":
            raise JobError(f"step {batch.step}: the loss is {loss}; the batch's keys are in {path}")

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.recipe.train.steps)

    def sample_if_due(self) -> None:
        if not self.recipe.train.sample_prompts or not self._due(self.recipe.train.sample_every):
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
        if self._due(self.recipe.train.validate_every) and self.recipe.data.validation_fraction:
            losses = validation_loss(self.engine, self._validation_batches(), self.recipe.data.seed)
            self.watch.metrics(losses, self.step)

    def _validation_batches(self) -> list[TrainingBatch]:
        if not hasattr(self, "_held_out"):
            _, feed = self._feed("validation")
            count = max(1, self.recipe.train.validation_samples // self.recipe.train.batch_size)
            available = feed.order.batches_before(1)
            if available == 0:
                raise InputError(
                    f"data.validation_fraction: only {feed.order.samples_per_epoch} samples are held out, fewer than "
                    f"one batch of {self.recipe.train.batch_size}; raise it or lower train.batch_size"
                )
            self._held_out = list(feed.batches(0, min(count, available)))
        return self._held_out

    def save_if_due(self) -> None:
        if not self._due(self.recipe.train.checkpoint_every):
            return
        last = self.step == self.recipe.train.steps
        position = checkpoints.Position(self.step, self.world_size, self.engine.ema.updates, self.config["facts"])
        with self._temporary() as folder:
            checkpoints.save(folder, self.engine.deepspeed, self.engine.ema, self.rank, position)
            model = averaged_model(self.engine, self.fresh) if last else None
            if model is not None:
                self._export(folder / "model", model)
            rt.report(
                {"step": self.step},
                checkpoint=rt.Checkpoint.from_directory(str(folder)),
                checkpoint_dir_name=checkpoints.checkpoint_name(self.step),
            )
        self.watch.checkpoint_saved()

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            yield Path(folder)

    def _export(self, folder: Path, model: LIDiT) -> None:
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
