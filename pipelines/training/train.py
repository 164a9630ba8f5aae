"""Training LI-DiT, the driver: what a run is made of, and the run itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lidit.config import Recipe
from lidit.data.matching import matching_family, matching_latents
from lidit.data.rows import require_held_out
from lidit.store import Corpus
from pipelines.evaluation.models import read_index
from pipelines.tracking import Tracker
from pipelines.training.driver import FREE_ENGINE, FitResult, drive, launch
from pipelines.training.sample_prompts import prompt_states
from pipelines.training.worker import train_worker

log = logging.getLogger(__name__)
# Settings that decide where and how fast a run goes, never what it computes.
FREE_SETTINGS = {
    "output": ..., "sources": ..., "ingest": ..., "pool": ..., "pools": ..., "sampler": ..., "evaluate": ...,
    "tracking": ..., "plan": ...,
    "corpus": ..., "encoders": ..., "codec": ...,  # their fingerprints are facts of their own
    "engine": FREE_ENGINE,
    "data": {"prefetch_batches"},
    "train": {"checkpoint_every", "keep_checkpoints", "keep_best", "async_upload", "log_every", "sample_every",
              "sample_prompts", "validate_every", "validation_samples"},
}  # fmt: skip


def run_facts(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """What a run is made of: config, corpus digest, family fingerprints.

    Raises InputError for a family that is missing or was made with other settings, and for a codec that is none.
    """
    texts = {encoder.name: matching_family(corpus, encoder) for encoder in recipe.encoders}
    return {
        "config": recipe.model_dump(mode="json", exclude=FREE_SETTINGS),  # type: ignore[arg-type]
        "corpus": corpus.digest,
        "text": {name: family.fingerprint for name, family in sorted(texts.items())},
        "latents": matching_latents(corpus, recipe.codec),
    }


def run_fit(recipe: Recipe, allow_drift: bool = False, tags: Mapping[str, str] | None = None) -> FitResult:
    """Train `recipe` to its last step, from wherever the run of this name stands. `tags`: more of them for its run."""
    corpus = Corpus.open(recipe.corpus)
    facts = run_facts(recipe, corpus)
    if recipe.train.validate_every:
        require_held_out(corpus, recipe.data, recipe.train.batch_size)
    tags = {
        **(tags or {}),
        "lidit.job": "train",
        "lidit.latents": facts["latents"],
        **{f"lidit.text.{name}": fingerprint for name, fingerprint in facts["text"].items()},
    }

    def train(recipe: Recipe, tracker: Tracker, folder: Path) -> None:
        prompts = prompt_states(recipe, recipe.train.sample_prompts, folder / "prompts")
        launch(train_worker, recipe, {"facts": facts, "prompts": prompts}, tracker, folder)

    result = drive(recipe, corpus, facts, tags, allow_drift, train)
    if not result.trained and read_index(result.model)["sampler"] != recipe.sampler.model_dump(mode="json"):
        log.warning(
            "%s keeps the sampler it was published with; give lidit evaluate sampler.steps=... or "
            "sampler.guidance_scale=..., and lidit sample --steps or --guidance", result.model
        )  # fmt: skip
    return result
