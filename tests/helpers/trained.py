"""A small real corpus with two text families and latents, and recipes that train on
it in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lidit.config import CodecSettings, EncoderSettings, IngestSettings, PoolSettings, Recipe
from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
from lidit.store import Corpus
from tests.helpers.tiny_models import tiny_llm


@dataclass(frozen=True)
class SmallWorld:
    """`corpus`: 97 scenes of 32 pixels in units of 20; text families `llama` and `qwen2`; latents
    `pixels`.
    """

    folder: Path
    corpus: Path
    encoders: tuple[EncoderSettings, ...]

    def open(self) -> Corpus:
        return Corpus.open(self.corpus)

    def recipe(self, output: Path, **changes: dict[str, Any]) -> Recipe:
        """Four layers below a second of work per step; sections given by name are put over it."""
        tree: dict[str, Any] = {
            "name": "run",
            "output": str(output),
            "corpus": str(self.corpus),
            "encoders": [encoder.model_dump(mode="json") for encoder in self.encoders],
            "model": {"width": 32, "depth": 2, "heads": 2, "patch_size": 8,
                      "refiner": {"depth": 1}},
            "objective": {"kind": "clean", "timesteps": "uniform"},
            "data": {"window_units": 2},
            "train": {"steps": 8, "batch_size": 12, "checkpoint_every": 4, "log_every": 2,
                      "ema_decay": 0.9,
                      "optimizer": {"lr": 1e-3}},
            "engine": {"workers": 2, "zero_stage": 2},
            "sampler": {"steps": 3},
        }  # fmt: skip
        for section, values in changes.items():
            tree[section] = (
                {**tree[section], **values} if isinstance(tree.get(section), dict) else values
            )
        return Recipe.model_validate(tree)


def make_small_world(folder: Path) -> SmallWorld:
    """Through the real jobs; Ray must be running."""
    from pipelines.corpus.embed import run_embed
    from pipelines.corpus.ingest import run_ingest
    from pipelines.corpus.latents import run_latents

    write_scene_shards(folder / "scenes", SceneSet(97, 32, seed=5, per_shard=60))
    corpus = folder / "corpus"
    run_ingest(
        [str(folder / "scenes")],
        str(corpus),
        IngestSettings(resolution=32, bucket_multiple=8, unit_samples=20),
    )
    encoders = tuple(
        EncoderSettings(
            name=family, model=str(tiny_llm(folder / family, family, width=width)), storage=storage
        )
        for family, width, storage in (("llama", 64, "bfloat16"), ("qwen2", 48, "int8"))
    )
    for encoder in encoders:
        run_embed(str(corpus), encoder, PoolSettings())
    run_latents(str(corpus), CodecSettings(name="pixels"), PoolSettings())
    return SmallWorld(folder, corpus, encoders)
