"""What every worker of a codec's training runs. Started by `pipelines.training.train_codec` on Ray Train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lidit.codecs.autoencoder import ReconstructionLoss, TrainableAutoencoder, measure_scale, psnr, reconstruct
from lidit.config import DataSettings
from lidit.config.codec import CodecRecipe
from lidit.data.feed import Feed
from lidit.data.pixels import PixelAssembler, PixelBatch
from lidit.data.rows import Part, Rows
from lidit.plots import labelled_grid
from lidit.store import Corpus, LatentFamily
from pipelines.training.engine import ShardedEngine, micro_steps
from pipelines.training.loop import TrainingLoop, attempt
from pipelines.training.metrics import averaged_model

SCALE_BATCHES = 32  # of training images, from which the latents' mean and deviation are measured


def codec_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry. `config`: recipe, facts, tracking handle, progress board."""
    attempt(_train, config)


def _train(config: dict[str, Any]) -> None:
    job = CodecJob(config)
    try:
        for batch in job.batches():
            job.take_step(batch)
            job.validate_if_due()
            job.save_if_due()
    finally:
        job.watch.close()


class CodecEngine(ShardedEngine[PixelBatch]):
    """An autoencoder and its reconstruction loss."""

    def __init__(self, recipe: CodecRecipe, model: TrainableAutoencoder, device: torch.device) -> None:
        super().__init__(recipe, model, device)
        self.reconstruction = ReconstructionLoss(recipe.loss, device)

    def loss(self, batch: PixelBatch) -> torch.Tensor:
        outputs = self.deepspeed(batch.pixels.to(self.compute_dtype), batch.noise.to(self.compute_dtype))
        return self.reconstruction(batch.pixels, outputs)

    def forward(self, batch: PixelBatch) -> None:
        dtype = next(self.deepspeed.module.parameters()).dtype
        self.deepspeed.module(batch.pixels.to(dtype), batch.noise.to(dtype))


class CodecJob(TrainingLoop[PixelBatch, TrainableAutoencoder]):
    """One worker's images, engine and position."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.recipe = recipe = CodecRecipe.model_validate(config["recipe"])
        super().__init__(config, recipe)
        self.corpus = Corpus.open(recipe.corpus)
        self.pixels: LatentFamily = self.corpus.latent_family(config["facts"]["pixels"])
        torch.manual_seed(recipe.data.seed)
        model = TrainableAutoencoder(recipe.model).train()
        fresh = TrainableAutoencoder(recipe.model) if self.rank == 0 else None
        self.begin(CodecEngine(recipe, model, self.device), self._feed("train", self.rank, self.world_size), fresh)

    def _feed(self, part: Part, rank: int, world_size: int) -> Feed[PixelBatch]:
        data, model = self.recipe.data, self.recipe.model
        settings = DataSettings(
            seed=data.seed, window_units=data.window_units, validation_fraction=data.validation_fraction
        )
        rows = Rows(self.corpus, settings, part)
        assembler = PixelAssembler(self.pixels, rows, data.seed, model.latent_channels, model.factor)
        return Feed(rows.order(self.recipe.train.batch_size), assembler, rank, world_size, data.prefetch_batches)

    def _images(self, part: Part, most: int) -> Iterator[torch.Tensor]:
        """Images [B, 3, H, W] of whole global batches, at most `most` of the first epoch's, all on this worker.

        As many images at a time as a training step puts on a device, which has no room for a whole batch.
        """
        feed = self._feed(part, rank=0, world_size=1)
        pieces = self.world_size * micro_steps(self.recipe, self.world_size)
        for batch in feed.batches(0, min(most, feed.steps_per_epoch)):
            yield from (piece.pixels for piece in batch.split(pieces))

    def validate_if_due(self) -> None:
        """PSNR of the averaged weights on held-out images, and a grid of originals above reconstructions."""
        if self.step != self.run.train.steps and not self.due(self.run.train.validate_every):
            return
        model = averaged_model(self.engine, self.fresh)
        measured = self._measure(model) if model is not None else [0.0, 0.0]
        told = torch.tensor(measured, device=self.device)
        dist.broadcast(told, 0)  # every rank's report names the loss by which checkpoints are compared
        self.watch.metrics(dict(zip(("validation/psnr", "validation/loss"), told.tolist(), strict=True)), self.step)

    def _measure(self, model: TrainableAutoencoder) -> list[float]:
        """Mean PSNR and L1 over the held-out images; writes the grid."""
        train, ratios, errors = self.recipe.train, [], []
        shown: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pixels in self._images("validation", max(1, train.validation_samples // train.batch_size)):
            rebuilt = reconstruct(model.autoencoder, pixels).cpu()
            ratios.append(psnr(rebuilt, pixels))  # of each image: pieces of any size weigh what they hold
            errors.append((rebuilt - pixels).abs().mean(dim=(1, 2, 3)))
            shown += list(zip(pixels, rebuilt, strict=True))[: train.grid_images - len(shown)]
        path = self.run.run_folder / "reconstructions" / f"step-{self.step:09}.png"
        path.parent.mkdir(exist_ok=True)
        images = [_as_bytes(original) for original, _ in shown] + [_as_bytes(rebuilt) for _, rebuilt in shown]
        labels = ["original"] * len(shown) + [f"{float(psnr(b[None], a[None])):.1f} dB" for a, b in shown]
        labelled_grid(images, labels, columns=len(shown)).save(path)
        if self.watch.tracker:
            self.watch.tracker.artifact(path, "reconstructions")
        return [float(torch.cat(ratios).mean()), float(torch.cat(errors).mean())]

    def export(self, folder: Path, model: TrainableAutoencoder) -> None:
        """diffusers' folder: averaged weights, shift and scaling factor measured on training images."""
        images = self._images("train", SCALE_BATCHES)
        shift, scaling = measure_scale(model.autoencoder, images, self.recipe.data.seed)
        model.autoencoder.register_to_config(shift_factor=shift, scaling_factor=scaling)
        model.autoencoder.save_pretrained(str(folder), safe_serialization=True)


def _as_bytes(image: torch.Tensor) -> np.ndarray:
    """[3, H, W] on [-1, 1] -> [H, W, 3] uint8."""
    return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
