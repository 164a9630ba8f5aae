"""Training a codec, the driver: the corpus's pixels once, LI-DiT's engine over them, a folder as diffusers has it."""

from __future__ import annotations

import math
from pathlib import Path

from lidit.codecs.encoding import check_buckets
from lidit.config import CodecSettings, DataSettings, PoolSettings
from lidit.config.codec import CodecRecipe
from lidit.data.rows import require_held_out
from lidit.store import Corpus
from pipelines.corpus.latents import run_latents
from pipelines.runtime.progress import ProgressBar
from pipelines.runtime.resources import connect
from pipelines.tracking import Tracker
from pipelines.training.codec_worker import codec_worker
from pipelines.training.driver import FREE_ENGINE, FitResult, drive, launch

FREE_SETTINGS = {
    "output": ..., "corpus": ..., "tracking": ...,
    "engine": FREE_ENGINE,
    "data": {"prefetch_batches"},
    "train": {"checkpoint_every", "keep_checkpoints", "keep_best", "async_upload", "log_every", "validate_every",
              "validation_samples", "grid_images"},
}  # fmt: skip


def run_train_codec(recipe: CodecRecipe, allow_drift: bool = False) -> FitResult:
    """Train `recipe` to its last step, from wherever the run of this name stands.

    The corpus's images are decoded once, into a family of codec `pixels`. Raises InputError for a corpus without
    images, whose buckets the codec does not divide, or of which less than a batch is held out.
    """
    corpus = Corpus.open(recipe.corpus)
    check_buckets(corpus, recipe.model.factor, recipe.data.scale)
    held_out = DataSettings(seed=recipe.data.seed, validation_fraction=recipe.data.validation_fraction)
    require_held_out(corpus, held_out, recipe.train.batch_size)
    connect(cpus=math.ceil(recipe.engine.workers * recipe.engine.cpus_per_worker) + 2)
    name = "pixels" if recipe.data.scale == 1 else f"pixels-x{recipe.data.scale}"
    with ProgressBar(f"latents {name}", None, "units") as progress:
        settings = CodecSettings(name=name, scale=recipe.data.scale)
        pixels = run_latents(corpus.folder.location, settings, PoolSettings(), progress)
    facts = {
        "config": recipe.model_dump(mode="json", exclude=FREE_SETTINGS),  # type: ignore[arg-type]
        "corpus": corpus.digest,
        "pixels": pixels.fingerprint,
    }
    tags = {"lidit.job": "train-codec", "lidit.pixels": pixels.fingerprint}

    def train(recipe: CodecRecipe, tracker: Tracker, folder: Path) -> None:
        launch(codec_worker, recipe, {"facts": facts}, tracker, folder)

    return drive(recipe, corpus, facts, tags, allow_drift, train)
