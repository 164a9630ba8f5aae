"""A codec trained on real Ray: resumed with the same bits, usable by `lidit latents`, refused where
it cannot fit.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from lidit.codecs import load_codec
from lidit.codecs.autoencoder import TrainableAutoencoder
from lidit.config import CodecSettings, IngestSettings, PoolSettings
from lidit.config.codec import CodecRecipe
from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
from lidit.errors import InputError
from lidit.store import Corpus
from pipelines.corpus.ingest import run_ingest
from pipelines.corpus.latents import run_latents
from pipelines.training.driver import TrainResult
from pipelines.training.metrics import TrainingMetrics
from pipelines.training.train_codec import CodecJob, train_codec

WEIGHTS = "model/diffusion_pytorch_model.safetensors"


def recipe_of(corpus: Path, output: Path, **changes: dict[str, Any]) -> CodecRecipe:
    tree: dict[str, Any] = {
        "name": "codec",
        "output": str(output),
        "corpus": str(corpus),
        "model": {"block_out_channels": [8, 16, 16], "layers_per_block": 1, "latent_channels": 4,
                  "norm_groups": 4,
                  "middle_attention": False},
        "data": {"validation_fraction": 0.3, "window_units": 2},
        "train": {"steps": 24, "batch_size": 12, "checkpoint_every": 12, "log_every": 4,
                  "ema_decay": 0.8,
                  "validate_every": 12, "grid_images": 4, "optimizer": {"lr": 4e-3}},
        "engine": {"workers": 2, "zero_stage": 1},
    }  # fmt: skip
    for section, values in changes.items():
        tree[section] = {**tree[section], **values}
    return CodecRecipe.model_validate(tree)


@pytest.fixture(scope="module")
def corpus(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """97 scenes of 32 pixels in units of 20, without any states."""
    folder = tmp_path_factory.mktemp("world")
    write_scene_shards(folder / "scenes", SceneSet(97, 32, seed=5, per_shard=60))
    settings = IngestSettings(resolution=32, bucket_multiple=8, unit_samples=20)
    run_ingest([str(folder / "scenes")], str(folder / "corpus"), settings)
    return folder / "corpus"


@pytest.fixture(scope="module")
def trained(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CodecRecipe, TrainResult]:
    recipe = recipe_of(corpus, tmp_path_factory.mktemp("codec"))
    return recipe, train_codec(recipe)


def history(result: TrainResult, metric: str) -> list[float]:
    found = MlflowClient(result.tracking_uri).get_metric_history(result.run_id, metric)
    return [point.value for point in sorted(found, key=lambda point: point.step)]


@pytest.mark.slow
def test_it_learns_and_its_run_holds_the_evidence(trained: tuple[CodecRecipe, TrainResult]) -> None:
    recipe, result = trained
    loss = history(result, "train/loss")
    assert len(loss) == 6
    assert loss[-1] < 0.8 * loss[0]
    first, last = history(result, "validation/psnr")
    assert last > first
    for step in (12, 24):
        assert (recipe.run_folder / "reconstructions" / f"step-{step:09}.png").stat().st_size > 500
    names = {
        artifact.path
        for artifact in MlflowClient(result.tracking_uri).list_artifacts(result.run_id)
    }
    assert {"model", "reconstructions"} <= names


@pytest.mark.slow
def test_the_folder_is_a_codec_with_a_measured_scale(
    trained: tuple[CodecRecipe, TrainResult], corpus: Path
) -> None:
    _, result = trained
    codec = load_codec(CodecSettings(name="mine", model=str(result.model)))
    assert (codec.factor, codec.channels) == (4, 4)
    pixels = torch.stack(Corpus.open(corpus).latent_family("pixels").read(0, range(20)))
    encoded = codec.encode(pixels)
    assert encoded.deviation is not None
    sampled = encoded.mean + encoded.deviation * torch.randn(
        encoded.mean.shape, generator=torch.Generator().manual_seed(0)
    )
    assert abs(sampled.mean().item()) < 0.1
    assert abs(sampled.std().item() - 1) < 0.1
    config = json.loads((result.model / "config.json").read_text())
    assert config["scaling_factor"] != 1.0
    assert config["shift_factor"] != 0.0


class LoneJob(CodecJob):
    """One of a training's workers, without the others and without an engine: it can measure."""

    def __init__(self, recipe: CodecRecipe, world_size: int) -> None:
        self.recipe = recipe
        self.rank, self.world_size, self.step, self.device = 0, world_size, 0, torch.device("cpu")
        self.corpus = Corpus.open(recipe.corpus)
        pixels = run_latents(recipe.corpus, CodecSettings(name="pixels"), PoolSettings())
        self.pixels = self.corpus.latent_family(pixels.fingerprint)
        engine, feed = SimpleNamespace(rank=1), SimpleNamespace(waited=0.0)
        self.metrics = TrainingMetrics(recipe, engine, feed, None, None)  # type: ignore[arg-type]


def test_measuring_puts_no_more_images_on_a_device_than_training(
    corpus: Path, tmp_path: Path
) -> None:
    """A global batch of 12, all at once and as 2 workers with parts of 12 / (2 x 2)
    images see it.
    """
    found: dict[str, list[float]] = {}
    for name, engine, largest in (
        ("whole", {"workers": 1}, 12),
        ("parts", {"workers": 2, "accumulation": 2}, 3),
    ):
        recipe = recipe_of(corpus, tmp_path / name, engine=engine)
        recipe.run_folder.mkdir(parents=True)
        torch.manual_seed(0)
        model, seen = TrainableAutoencoder(recipe.model).eval(), list[int]()
        model.autoencoder.encoder.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(len(given[0]))
        )
        job = LoneJob(recipe, int(engine["workers"]))
        quality = job._measure(model)
        measured = len(seen)
        job.export(tmp_path / name / "model", model)
        assert max(seen[:measured]) == max(seen[measured:]) == largest
        config = json.loads((tmp_path / name / "model" / "config.json").read_text())
        found[name] = [*quality, config["shift_factor"], config["scaling_factor"]]
        assert (recipe.run_folder / "reconstructions" / "step-000000000.png").stat().st_size > 500
    assert found["parts"] == pytest.approx(found["whole"], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bits(
    trained: tuple[CodecRecipe, TrainResult], corpus: Path, tmp_path: Path
) -> None:
    _, straight = trained
    first = recipe_of(corpus, tmp_path, train={"steps": 12})
    train_codec(first)
    with pytest.raises(InputError, match=r"config.train.steps: 12 -> 24(.|\n)*--allow-drift"):
        train_codec(recipe_of(corpus, tmp_path))
    resumed = train_codec(recipe_of(corpus, tmp_path), allow_drift=True)
    expected, found = (load_file(result.model.parent / WEIGHTS) for result in (straight, resumed))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert not train_codec(recipe_of(corpus, tmp_path)).trained


def test_what_does_not_fit_is_refused_before_training(corpus: Path, tmp_path: Path) -> None:
    deep = {"block_out_channels": [4] * 5, "norm_groups": 4}
    with pytest.raises(InputError, match="multiples of 8, the codec needs multiples of 16"):
        train_codec(recipe_of(corpus, tmp_path, model=deep))
    with pytest.raises(
        InputError,
        match=r"validation_fraction: only \d+ samples are held out, fewer than " r"one batch",
    ):
        train_codec(recipe_of(corpus, tmp_path, data={"validation_fraction": 0.02}))
