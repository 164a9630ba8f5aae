"""Training a codec: `train_codec` is the driver, `codec_worker` the loop, `CodecJob` its parts.

The corpus's pixels are decoded once; LI-DiT's engine trains over them; the result is a folder as
diffusers has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lidit.codecs.autoencoder import (
    ReconstructionLoss,
    TrainableAutoencoder,
    measure_scale,
    psnr,
    reconstruct,
)
from lidit.codecs.encoding import check_buckets
from lidit.config import CodecSettings, DataSettings, PoolSettings
from lidit.config.codec import CodecRecipe
from lidit.data.feed import Feed
from lidit.data.pixels import PixelAssembler, PixelBatch
from lidit.data.rows import Part, Rows, require_held_out
from lidit.grids import labelled_grid
from lidit.pixels import to_bytes
from lidit.store import Corpus
from pipelines.corpus.latents import run_latents
from pipelines.runtime.progress import ProgressBar
from pipelines.runtime.resources import connect
from pipelines.training.drift import FREE_ENGINE, settings_facts
from pipelines.training.driver import TrainResult, open_run
from pipelines.training.engine import ShardedEngine, micro_steps, set_up_device
from pipelines.training.loop import TrainingLoop, reports_failure
from pipelines.training.mfu import Flops, step_flops

SCALE_BATCHES = 32  # of training images, from which the latents' mean and deviation are measured
FREE_SETTINGS = {
    "output": ..., "corpus": ..., "tracking": ...,
    "engine": FREE_ENGINE,
    "data": {"prefetch_batches"},
    "train": {"checkpoint_every", "keep_checkpoints", "keep_best", "async_upload", "log_every",
              "validate_every",
              "validation_samples", "grid_images"},
}  # fmt: skip


# -- the driver -----------------------------------------------------------------------------------


def train_codec(recipe: CodecRecipe, allow_drift: bool = False) -> TrainResult:
    """Train a codec to its last step and publish it, from wherever the run of its name stands.

    Raises InputError for a corpus without images, whose buckets the codec does not divide, or of
    which less than a batch is held out.
    """
    corpus = Corpus.open(recipe.corpus)
    check_buckets(corpus, recipe.model.factor, recipe.data.scale)
    require_held_out(corpus, _rows_settings(recipe), recipe.train.batch_size)

    # Decoding is a family of the codec "pixels": once per corpus, whatever is trained on it.
    connect(cpus=math.ceil(recipe.engine.workers * recipe.engine.cpus_per_worker) + 2)
    name = "pixels" if recipe.data.scale == 1 else f"pixels-x{recipe.data.scale}"
    with ProgressBar(f"latents {name}", None, "units") as progress:
        settings = CodecSettings(name=name, scale=recipe.data.scale)
        pixels = run_latents(corpus.folder.location, settings, PoolSettings(), progress)
    facts = {
        "config": settings_facts(recipe, FREE_SETTINGS),
        "corpus": corpus.digest,
        "pixels": pixels.fingerprint,
    }
    tags = {"lidit.job": "train-codec", "lidit.pixels": pixels.fingerprint}

    with open_run(recipe, corpus, facts, tags, allow_drift) as run:
        if not run.finished:
            run.launch(codec_worker, {"facts": facts})
            run.publish_model()
    return run.result


def _rows_settings(recipe: CodecRecipe) -> DataSettings:
    data = recipe.data
    return DataSettings(
        seed=data.seed,
        window_units=data.window_units,
        prefetch_batches=data.prefetch_batches,
        validation_fraction=data.validation_fraction,
    )


# -- the loop -------------------------------------------------------------------------------------


@reports_failure
def codec_worker(config: dict[str, Any]) -> None:
    """What every worker runs. `config`: recipe, facts, tracking handle, progress board."""
    job = CodecJob(config)
    try:
        for batch in job.batches():
            job.take_step(batch)
            job.validate_if_due()
            job.save_if_due()
    finally:
        job.metrics.close()


class CodecEngine(ShardedEngine[PixelBatch]):
    """An autoencoder and its reconstruction loss."""

    def __init__(
        self, recipe: CodecRecipe, model: TrainableAutoencoder, device: torch.device
    ) -> None:
        super().__init__(recipe, model, device)
        self.reconstruction = ReconstructionLoss(recipe.loss, device)
        self._flops_per_image: float | None = None

    def loss(self, batch: PixelBatch) -> torch.Tensor:
        outputs = self.deepspeed(
            batch.pixels.to(self.compute_dtype), batch.noise.to(self.compute_dtype)
        )
        return self.reconstruction(batch.pixels, outputs)

    def step_flops(self, batch: PixelBatch) -> Flops | None:
        """Counted once, on the forward pass of one image: every image has the same size."""
        if self.recipe.engine.zero_stage == 3:  # a lone forward would wait for the other ranks
            return None
        if self._flops_per_image is None:
            one, dtype = (
                batch.split(len(batch.keys))[0],
                next(self.deepspeed.module.parameters()).dtype,
            )
            forward = lambda: self.deepspeed.module(one.pixels.to(dtype), one.noise.to(dtype))  # noqa: E731
            self._flops_per_image = step_flops(forward, 1)
        return Flops(*[self._flops_per_image * len(batch.keys)] * 2)


class CodecJob(TrainingLoop[PixelBatch, TrainableAutoencoder]):
    """One worker's images, engine and position. Steps and checkpoints are `TrainingLoop`'s."""

    recipe: CodecRecipe

    def __init__(self, config: dict[str, Any]) -> None:
        recipe = CodecRecipe.model_validate(config["recipe"])
        device = set_up_device(recipe.engine)
        self.corpus = Corpus.open(recipe.corpus)
        self.pixels = self.corpus.latent_family(config["facts"]["pixels"])
        torch.manual_seed(recipe.data.seed)
        engine = CodecEngine(recipe, TrainableAutoencoder(recipe.model).train(), device)
        fresh = TrainableAutoencoder(recipe.model) if engine.rank == 0 else None
        super().__init__(
            config, engine, self._feed(recipe, "train", engine.rank, engine.world_size), fresh
        )

    def _feed(
        self, recipe: CodecRecipe, part: Part, rank: int, world_size: int
    ) -> Feed[PixelBatch]:
        data, model = recipe.data, recipe.model
        rows = Rows(self.corpus, _rows_settings(recipe), part)
        assembler = PixelAssembler(
            self.pixels, rows, data.seed, model.latent_channels, model.factor
        )
        return Feed(rows.order(recipe.train.batch_size), assembler, rank, world_size, rows.settings)

    def _images(self, part: Part, most: int) -> Iterator[torch.Tensor]:
        """Images [B, 3, H, W] of at most `most` global batches of the first epoch, whole.

        As many images at a time as a training step puts on a device, which has no room for a whole
        batch.
        """
        feed = self._feed(self.recipe, part, rank=0, world_size=1)
        pieces = self.world_size * micro_steps(self.recipe, self.world_size)
        for batch in feed.batches(0, min(most, feed.steps_per_epoch)):
            yield from (piece.pixels for piece in batch.split(pieces))

    def validate_if_due(self) -> None:
        """PSNR of the averaged weights on held-out images, and a grid of originals above
        reconstructions.
        """
        if self.step != self.recipe.train.steps and not self.due(self.recipe.train.validate_every):
            return
        model = self.averaged()
        measured = self._measure(model.to(self.device)) if model is not None else [0.0, 0.0]
        shared = torch.tensor(measured, device=self.device)
        # every rank's report names the loss by which checkpoints are compared
        dist.broadcast(shared, 0)
        self.metrics.log(
            dict(zip(("validation/psnr", "validation/loss"), shared.tolist(), strict=True)),
            self.step,
        )

    def _measure(self, model: TrainableAutoencoder) -> list[float]:
        """Mean PSNR and L1 over the held-out images; writes the grid."""
        train, ratios, errors = self.recipe.train, [], []
        shown: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pixels in self._images(
            "validation", max(1, train.validation_samples // train.batch_size)
        ):
            rebuilt = reconstruct(model.autoencoder, pixels).cpu()
            # of each image: pieces of any size weigh what they hold
            ratios.append(psnr(rebuilt, pixels))
            errors.append((rebuilt - pixels).abs().mean(dim=(1, 2, 3)))
            shown += list(zip(pixels, rebuilt, strict=True))[: train.grid_images - len(shown)]
        path = self.recipe.run_folder / "reconstructions" / f"step-{self.step:09}.png"
        path.parent.mkdir(exist_ok=True)
        images = [_as_bytes(original) for original, _ in shown] + [
            _as_bytes(rebuilt) for _, rebuilt in shown
        ]
        labels = [""] * len(shown) + [f"{float(psnr(b[None], a[None])):.1f} dB" for a, b in shown]
        headings = ("original", "through the codec")
        labelled_grid(images, labels, columns=len(shown), headings=headings).save(path)
        if self.metrics.tracker:
            self.metrics.tracker.image(path, "reconstructions", self.step)
        return [float(torch.cat(ratios).mean()), float(torch.cat(errors).mean())]

    def export(self, folder: Path, model: TrainableAutoencoder) -> None:
        """diffusers' folder: averaged weights, shift and scaling factor measured on training
        images.
        """
        model.to(self.device)
        images = self._images("train", SCALE_BATCHES)
        shift, scaling = measure_scale(model.autoencoder, images, self.recipe.data.seed)
        model.autoencoder.register_to_config(shift_factor=shift, scaling_factor=scaling)
        model.autoencoder.save_pretrained(str(folder), safe_serialization=True)


def _as_bytes(image: torch.Tensor) -> np.ndarray:
    """[3, H, W] on [-1, 1] -> [H, W, 3] uint8."""
    return to_bytes(image).permute(1, 2, 0).numpy()
