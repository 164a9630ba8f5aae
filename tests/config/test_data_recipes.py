"""The recipes of real data on stand-in tars of the same layout, and one of two resolutions at toy
size.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lidit.config import PoolSettings
from lidit.config.codec import CodecRecipe
from lidit.config.settings import load_yaml, validate
from lidit.config.shipped import RECIPES, load_recipe
from lidit.data.rows import Rows
from lidit.datasets.scenes.shards import SceneSet, write_scene_shards
from lidit.pipeline import LIDiTPipeline
from lidit.store import Corpus
from pipelines.corpus.embed import run_embed
from pipelines.corpus.ingest import run_ingest
from pipelines.corpus.latents import run_latents
from pipelines.training.train import train
from tests.helpers.pictures import encoded, picture, write_tar
from tests.helpers.trained import SmallWorld

WEIGHTS = "model/model/diffusion_pytorch_model.safetensors"


def img2dataset(
    folder: Path, shard: int, rows: list[tuple[str, str | None, dict[str, Any], tuple[int, int]]]
) -> None:
    """A shard as img2dataset writes it: KEY.jpg, KEY.txt, KEY.json per row; its table and
    statistics beside the tar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    members = []
    for number, (caption, recaption, extra, size) in enumerate(rows):
        key = f"{shard:05}{number:04}"
        record = {"caption": caption, "url": f"https://example.org/{key}.jpg", "key": key,
                  "status": "success",
                  "error_message": None, "width": size[0], "height": size[1], "sha256": "0" * 64,
                  **extra}  # fmt: skip
        if recaption is not None:
            record["synthetic_caption"] = recaption
        members += [(f"{key}.jpg", encoded(picture(*size, seed=number), "JPEG")), (f"{key}.txt",
                                                                                   caption.encode()),
                    (f"{key}.json", json.dumps(record).encode())]  # fmt: skip
    write_tar(folder / f"{shard:05}.tar", members)
    (folder / f"{shard:05}.parquet").write_bytes(b"img2dataset's own record of the shard, not read")
    (folder / f"{shard:05}_stats.json").write_text("{}")


def captions(corpus: Corpus) -> dict[str, list[tuple[str, str]]]:
    """Sample key -> (text, origin)."""
    found = {}
    for unit in range(corpus.num_units):
        texts = corpus.captions(unit)["text"].to_pylist()
        for row in corpus.samples(unit).to_pylist():
            found[row["key"]] = [
                (texts[entry["index"]], entry["origin"]) for entry in row["captions"]
            ]
    return found


def refusals(corpus: Corpus) -> dict[str, str]:
    return {row["key"]: row["reason"] for table in corpus.quarantine() for row in table.to_pylist()}


def test_the_ablations_data(ray_cluster: None, tmp_path: Path) -> None:
    imagenet, cc12m = tmp_path / "imagenet", tmp_path / "cc12m"
    imagenet.mkdir()
    for shard in range(2):  # keys start anew in every tar, classes are numbers
        members = [m for i in range(3) for m in ((f"{i:06}.jpg", encoded(picture(300, 260, seed=i),
                                                                         "JPEG")),
                                                 (f"{i:06}.cls",
                                                  str(2 * shard).encode()))]  # fmt: skip
        write_tar(imagenet / f"imagenet-train-{shard:06}.tar", members)
    (tmp_path / "classes.txt").write_text("tench\ngoldfish\ngreat white shark\n")
    img2dataset(cc12m, 0, [
        ("<PERSON> rides a horse", "A person on a brown horse.", {}, (320, 256)),
        ("visit www.shop.example for this", "A red shoe on a table.", {}, (256, 300)),
        ("cat, cute, funny, pet, fur, red", None, {}, (256, 256)),
    ])  # fmt: skip
    recipe = load_recipe(
        "paper-ablation",
        [
            f"sources=[{imagenet}, {cc12m}]",
            f"ingest.class_names={tmp_path / 'classes.txt'}",
            f"corpus={tmp_path / 'c'}",
        ],
    )
    run_ingest(list(recipe.sources), recipe.corpus, recipe.ingest)
    corpus = Corpus.open(recipe.corpus)
    found = captions(corpus)
    assert sorted(c for cs in found.values() for c in cs if "photo" in c[0]) == [
        *[("a photo of great white shark", "original")] * 3,
        *[("a photo of tench", "original")] * 3,
    ]
    by_end = {key[-9:]: cs for key, cs in found.items()}
    assert by_end["000000000"] == [
        ("<PERSON> rides a horse", "original"), ("A person on a brown horse.", "synthetic")
    ]  # fmt: skip
    assert by_end["000000001"] == [("A red shoe on a table.", "synthetic")]
    assert len(found) == 8
    reasons = {key[-9:]: why for key, why in refusals(corpus).items()}
    assert "URL" in reasons["000000001"]
    assert "tag list" in reasons["000000002"]
    buckets = {
        row["bucket"]
        for unit in range(corpus.num_units)
        for row in corpus.samples(unit).to_pylist()
    }
    assert all(int(side) % 16 == 0 for bucket in buckets for side in bucket.split("x"))
    # Both origins of a sample are drawn, as the recipe's weights say.
    rows = Rows(corpus, recipe.data).unit(corpus.num_units - 1)
    weights = np.diff(rows.cumulative)
    assert weights.min() == weights.max() == 1


def test_the_filters_of_the_large_set(ray_cluster: None, tmp_path: Path) -> None:
    img2dataset(tmp_path / "laion", 7, [
        ("a lighthouse at dusk", "A white lighthouse on a cliff.", {"aesthetic_score": 5.1}, (400,
                                                                                              300)),
        ("dull", None, {"aesthetic_score": 4.69}, (400, 300)),
        ("small", None, {"aesthetic_score": 6.0}, (400, 255)),
        ("no score", None, {}, (400, 300)),
    ])  # fmt: skip
    recipe = load_recipe(
        "lidit-1b", [f"sources=[{tmp_path / 'laion'}]", f"corpus={tmp_path / 'c'}"]
    )
    run_ingest(list(recipe.sources), recipe.corpus, recipe.ingest)
    corpus = Corpus.open(recipe.corpus)
    assert list(captions(corpus).values()) == [
        [("a lighthouse at dusk", "original"), ("A white lighthouse on a cliff.", "synthetic")]
    ]
    why = {key[-4:]: reason for key, reason in refusals(corpus).items()}
    assert "4.69, min_aesthetic=4.7" in why["0001"]
    assert "400x255, min_side=256" in why["0002"]
    assert "no aesthetic score" in why["0003"]


@pytest.fixture(scope="module")
def two_resolutions(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both shipped recipes, shortened, on 64-pixel scenes and a tiny LLM."""
    folder = tmp_path_factory.mktemp("two")
    write_scene_shards(folder / "scenes", SceneSet(48, 64, seed=3, per_shard=48))
    encoder = small_world.encoders[0].model_dump(mode="json")
    small = ["model.width=32", "model.depth=2", "model.heads=2", "train.batch_size=8",
             "engine.workers=1",
             "train.checkpoint_every=4", "train.sample_prompts=[a red circle]",
             "train.sample_every=0"]  # fmt: skip
    hardly = ["train.steps=2", "train.optimizer.lr=1.0e-12", "train.optimizer.weight_decay=0"]
    for half, own in (("low", ["train.steps=6"]), ("high", hardly)):
        place = [f"corpus={folder / 'corpus'}", f"sources=[{folder / 'scenes'}]",
                 f"output={folder / 'runs'}",
                 f"encoders=[{json.dumps(encoder)}]"]  # fmt: skip
        start = [f"train.init_from={folder / 'runs/low/model'}"] if half == "high" else []
        recipe = load_recipe(f"two-resolutions-{half}", [*place, *small, *own, *start])
        run_ingest(list(recipe.sources), recipe.corpus, recipe.ingest)
        run_embed(recipe.corpus, recipe.encoders[0], PoolSettings())
        run_latents(recipe.corpus, recipe.codec, PoolSettings())
        train(recipe)
    return folder


@pytest.mark.slow
def test_the_second_resolution_starts_from_the_first(two_resolutions: Path) -> None:
    corpus = Corpus.open(two_resolutions / "corpus")
    assert corpus.latent_family("pixels").shapes(0)[0] == (3, 32, 32)
    assert corpus.latent_family("pixels-x2").shapes(0)[0] == (3, 64, 64)
    low, high = (load_file(two_resolutions / "runs" / half / WEIGHTS) for half in ("low", "high"))
    assert low.keys() == high.keys()
    # its rate is next to nothing: what it ends with is what it began with
    for name, value in low.items():
        assert torch.allclose(value, high[name], atol=1e-6), name
    images = LIDiTPipeline.from_pretrained(two_resolutions / "runs/high/model")(
        ["a red circle"], seed=0, num_inference_steps=2, output_type="np"
    ).images
    assert images.shape == (1, 64, 64, 3)


def test_the_shipped_codec_is_valid() -> None:
    for path in RECIPES.glob("codec-*.yaml"):
        assert validate(CodecRecipe, load_yaml(path), path.name).model.factor == 4
