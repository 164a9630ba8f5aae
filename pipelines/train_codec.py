"""Training a codec, the driver: the corpus's pixels once, LI-DiT's engine over them, a folder as diffusers has it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lidit.codec_recipe import CodecRecipe
from lidit.config import CodecSettings, PoolSettings
from lidit.settings import flatten
from lidit.store import Corpus, digest_of
from pipelines import tracking
from pipelines.cluster import connect
from pipelines.codec_worker import codec_worker
from pipelines.fit import (
    FACTS,
    FREE_ENGINE,
    FitResult,
    check_drift,
    draw_curves,
    finished_step,
    launch,
    note_run,
    publish_model,
    read_run_id,
)
from pipelines.latents import check_buckets, run_latents

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
    images or whose buckets the codec does not divide.
    """
    corpus = Corpus.open(recipe.corpus)
    check_buckets(corpus, recipe.model.factor, recipe.data.scale)
    connect(cpus=recipe.engine.workers + 2)
    name = "pixels" if recipe.data.scale == 1 else f"pixels-x{recipe.data.scale}"
    pixels = run_latents(corpus.folder.location, CodecSettings(name=name, scale=recipe.data.scale), PoolSettings())
    facts = {
        "config": recipe.model_dump(mode="json", exclude=FREE_SETTINGS),  # type: ignore[arg-type]
        "corpus": corpus.digest,
        "pixels": pixels.fingerprint,
    }
    folder = recipe.run_folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe.model_copy(update={"output": str(folder.parent), "corpus": corpus.folder.location})
    check_drift(folder, facts, allow_drift)
    uri = tracking.store_uri(recipe.tracking.uri, folder.parent)
    finished = finished_step(folder)
    if finished is not None and finished >= recipe.train.steps:
        return FitResult(folder / "model", finished, uri, read_run_id(folder), trained=False)
    (folder / FACTS).write_text(json.dumps(facts, indent=1, sort_keys=True))
    tags = {
        "lidit.job": "train-codec",
        "lidit.corpus_digest": corpus.digest,
        "lidit.pixels": pixels.fingerprint,
        "lidit.ray_job": os.environ.get("RAY_JOB_ID", "embedded"),
    }
    key = digest_of({"name": recipe.name, "output": recipe.output})[:32]
    with tracking.tracked_run(uri, recipe.tracking.experiment, recipe.name, key, flatten(recipe), tags, folder) as run:
        run.dataset(Path(recipe.corpus).name, corpus.digest, recipe.corpus)
        note_run(folder, run)
        config: dict[str, Any] = {"facts": facts}
        launch(codec_worker, recipe, config, run, folder)
        publish_model(folder)
        draw_curves(run, folder / "plots")
        run.artifact(folder / "model", "model")
        if recipe.tracking.registered_model:
            run.register(recipe.tracking.registered_model, "model", recipe.tracking.alias)
    note_run(folder, run)
    return FitResult(folder / "model", recipe.train.steps, uri, run.handle.run_id, trained=True)
