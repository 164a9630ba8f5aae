"""Training on real Ray: resumes after kills with the same bits, refuses drift, keeps one honest
MLflow run.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from safetensors.torch import load_file

from lidit.config import CodecSettings, PoolSettings, Recipe
from lidit.errors import InputError, JobError
from lidit.pipeline import LIDiTPipeline
from pipelines.corpus.latents import run_latents
from pipelines.training import checkpoints
from pipelines.training.driver import TrainResult
from pipelines.training.train import train
from tests.helpers.killing import kill_a_worker_after
from tests.helpers.trained import SmallWorld

FINAL = "model/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def undisturbed(
    small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, TrainResult]:
    recipe = small_world.recipe(
        tmp_path_factory.mktemp("undisturbed"),
        train={"sample_every": 4, "sample_prompts": ["a red circle", "a blue square"],
               "validate_every": 8,
               "validation_samples": 12},
        data={"validation_fraction": 0.2},
        tracking={"registered_model": "lidit-test"},
        card={"license": "cc-by-4.0", "datasets": ["someone/scenes"]},
    )  # fmt: skip
    return recipe, train(recipe)


def history(result: TrainResult, metric: str) -> list[int]:
    found = MlflowClient(result.tracking_uri).get_metric_history(result.run_id, metric)
    return sorted(point.step for point in found)


def test_the_model_folder_draws(undisturbed: tuple[Recipe, TrainResult]) -> None:
    recipe, result = undisturbed
    pipe = LIDiTPipeline.from_pretrained(result.model)
    images = pipe(["a red circle", "a blue square"], seed=[1, 2], output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    assert not np.array_equal(images[0], images[1])
    for step in (4, 8):
        assert (recipe.run_folder / "samples" / f"step-{step:09}.png").stat().st_size > 500


def test_the_card_says_what_the_recipe_says_of_it(
    undisturbed: tuple[Recipe, TrainResult],
) -> None:
    recipe, result = undisturbed
    card = ModelCard.load(result.model / "README.md").data
    assert (card.license, card.datasets) == ("cc-by-4.0", ["someone/scenes"])
    renamed = recipe.card.model_copy(update={"license": "mit"})
    assert not train(recipe.model_copy(update={"card": renamed})).trained  # no drift


def test_sample_grids_and_the_published_pipeline_see_the_same_states(
    undisturbed: tuple[Recipe, TrainResult],
) -> None:
    """One of the encoders stores int8: both must round a prompt as the corpus rounds
    its captions.
    """
    recipe, result = undisturbed
    pipe = LIDiTPipeline.from_pretrained(result.model)
    assert [encoder.storage for encoder in recipe.encoders] == ["bfloat16", "int8"]
    for encoder in recipe.encoders:
        (kept,) = (recipe.run_folder / "prompts").glob(f"{encoder.name}-*.safetensors")
        sampled, published = (
            load_file(kept),
            pipe.encoders[encoder.name].encode(recipe.train.sample_prompts),
        )
        assert len(sampled) == len(published) == 2
        for number, states in enumerate(published):
            assert torch.equal(sampled[str(number)], states), encoder.name


def test_one_run_holds_everything(
    undisturbed: tuple[Recipe, TrainResult], small_world: SmallWorld
) -> None:
    recipe, result = undisturbed
    client = MlflowClient(result.tracking_uri)
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert history(result, "train/loss") == [2, 4, 6, 8]
    assert history(result, "validation/loss") == [8]
    assert run.data.params["train.optimizer.lr"] == "0.001"
    assert run.data.tags["lidit.corpus_digest"] == small_world.open().digest
    for family in small_world.open().text_families():
        assert run.data.tags[f"lidit.text.{family.name}"] == family.fingerprint
    read = {entry.dataset.name: entry.dataset for entry in run.inputs.dataset_inputs}
    assert read["corpus"].digest == small_world.open().digest[:36]
    families = [*small_world.open().text_families(), *small_world.open().latent_families()]
    assert set(read) == {"corpus", *(family.directory for family in families)}
    assert all(json.loads(data.profile)["rows"] for name, data in read.items() if name != "corpus")
    names = {artifact.path for artifact in client.list_artifacts(result.run_id)}
    assert {"images", "recipe.json", "plots", "environment"} <= names
    shown = {
        Path(each.path).name.split("+timestamp")[0]
        for each in client.list_artifacts(result.run_id, "images")
    }
    assert shown == {"samples+step+4", "samples+step+8"}
    assert {a.path for a in client.list_artifacts(result.run_id, "plots")} == {
        "plots/loss.png",
        "plots/timesteps.png",
    }
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (str(model.status), output.step) == ("READY", 8)
    assert {metric.key for metric in model.metrics} == {"train/loss", "validation/loss"}
    registered = client.get_model_version_by_alias("lidit-test", recipe.tracking.alias)
    assert output.model_id in registered.source
    folder = Path(registered.source.removeprefix("file://"))
    assert LIDiTPipeline.from_pretrained(folder).config.height == 32


def test_a_run_says_who_what_and_on_which_machine(undisturbed: tuple[Recipe, TrainResult]) -> None:
    recipe, result = undisturbed
    client = MlflowClient(result.tracking_uri)
    run = client.get_run(result.run_id)
    tags = run.data.tags
    assert tags["mlflow.source.name"]
    assert len(tags["mlflow.source.git.commit"]) == 40
    for said in (str(recipe.run_folder), "8 steps", *(encoder.name for encoder in recipe.encoders)):
        assert said in tags["mlflow.note.content"]
    shown = f"![samples](get-artifact?path=samples.png&run_uuid={result.run_id})"
    assert tags["mlflow.note.content"].endswith(shown)
    # No defaults, and what the defaults came to.
    assert "train.non_finite" not in run.data.params
    assert run.data.params["engine.world_size"] == str(recipe.engine.workers)
    assert int(run.data.params["model.parameters"]) > 10_000
    assert run.data.metrics["train/samples_seen"] == 8 * recipe.train.batch_size
    assert 0 < run.data.metrics["system/system_memory_usage_percentage"] <= 100
    found = {Path(each.path).name for each in client.list_artifacts(result.run_id, "environment")}
    assert found == {"requirements.txt", "hardware.json"}


def test_the_same_command_again_does_nothing(undisturbed: tuple[Recipe, TrainResult]) -> None:
    recipe, result = undisturbed
    before = (result.model / FINAL).stat().st_mtime_ns
    again = train(recipe)
    assert not again.trained
    assert (again.step, again.run_id) == (8, result.run_id)
    assert (result.model / FINAL).stat().st_mtime_ns == before


def test_drift_is_refused_with_what_differs(undisturbed: tuple[Recipe, TrainResult]) -> None:
    recipe, _ = undisturbed
    changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"seed": 9})})
    with pytest.raises(InputError, match=r"config.data.seed: 0 -> 9(.|\n)*--allow-drift"):
        train(changed)


def test_a_missing_family_and_other_settings_are_named(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    recipe = small_world.recipe(tmp_path)
    other = recipe.encoders[0].model_copy(update={"instruction": "Look:"})
    with pytest.raises(InputError, match=r"instruction: .* -> \"Look:\"(.|\n)*lidit embed"):
        train(recipe.model_copy(update={"encoders": (other, recipe.encoders[1])}))
    absent = recipe.encoders[0].model_copy(update={"name": "absent"})
    with pytest.raises(InputError, match=r"'absent'.*llama.*lidit embed"):
        train(recipe.model_copy(update={"encoders": (absent,)}))
    with pytest.raises(InputError, match="not a corpus"):
        train(recipe.model_copy(update={"corpus": str(tmp_path)}))


def test_what_this_machine_does_not_have_is_refused(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    for engine in ({"gpus_per_worker": 1}, {"resources": {"trainer": 1}}):
        with pytest.raises(
            InputError, match=r"engine: 2 workers ask for .* offers 0; lower engine\.workers"
        ):
            train(small_world.recipe(tmp_path, engine=engine))


def test_too_few_held_out_samples_are_told_before_training(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    recipe = small_world.recipe(
        tmp_path, train={"validate_every": 4}, data={"validation_fraction": 0.01}
    )
    with pytest.raises(
        InputError,
        match=r"only \d samples are held out, fewer than one batch of " r"12(.|\n)*batch_size",
    ):
        train(recipe)
    assert not recipe.run_folder.exists()


def test_a_killed_worker_costs_nothing_but_time(
    undisturbed: tuple[Recipe, TrainResult], tmp_path: Path
) -> None:
    recipe, result = undisturbed
    settings = recipe.train.model_copy(update={"async_upload": True})
    again = recipe.model_copy(update={"output": str(tmp_path), "train": settings})
    pids: list[int] = []
    left = (
        Path(tempfile.gettempdir())
        / f"{checkpoints.unsent_prefix(again.run_folder)}of-a-killed-worker"
    )
    left.mkdir()
    hunter = kill_a_worker_after(again.run_folder, 4, pids)
    killed = train(again)
    hunter.join()
    assert pids, "nothing was killed"
    assert not list(left.parent.glob(f"{checkpoints.unsent_prefix(again.run_folder)}*")), (
        "checkpoints fill the disk"
    )
    straight, resumed = (load_file(r.model / FINAL) for r in (result, killed))
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
    assert history(killed, "train/loss") == [2, 4, 6, 8]


@pytest.mark.slow
def test_the_best_and_the_newest_checkpoints_are_kept(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    recipe = small_world.recipe(
        tmp_path,
        train={"steps": 9, "checkpoint_every": 1, "validate_every": 1, "validation_samples": 12,
               "keep_best": True,
               "optimizer": {"lr": 0.1}},
        data={"validation_fraction": 0.2},
        engine={"workers": 1},
    )  # fmt: skip
    result = train(recipe)
    points = MlflowClient(result.tracking_uri).get_metric_history(result.run_id, "validation/loss")
    losses = {point.step: point.value for point in points}
    assert len(losses) == 9
    best = sorted(losses, key=lambda step: losses[step])[:2]
    kept = {
        int(folder.name.removeprefix("step-"))
        for folder in checkpoints.candidates(recipe.run_folder)
    }
    assert best != [9, 8], "nothing was learned about the choice"
    assert kept == {*best, 9}


@pytest.mark.slow
def test_a_second_stage_starts_from_the_first_ones_weights(
    undisturbed: tuple[Recipe, TrainResult], small_world: SmallWorld, tmp_path: Path
) -> None:
    """As the paper trains: then at twice the resolution, with latents of their own."""
    recipe, result = undisturbed
    corpus = tmp_path / "corpus"
    shutil.copytree(small_world.corpus, corpus)
    larger = CodecSettings(name="larger", scale=2)
    run_latents(str(corpus), larger, PoolSettings())
    settings = recipe.train.model_copy(
        update={"steps": 1, "init_from": str(result.model), "ema_decay": 0.0, "validate_every": 0,
                "optimizer": recipe.train.optimizer.model_copy(update={"lr": 1e-12})}
    )  # fmt: skip
    second = train(
        recipe.model_copy(
            update={
                "name": "second",
                "output": str(tmp_path),
                "corpus": str(corpus),
                "codec": larger,
                "train": settings,
            }
        )
    )
    first_weights, second_weights = (load_file(r.model / FINAL) for r in (result, second))
    for name, value in first_weights.items():
        torch.testing.assert_close(second_weights[name], value, rtol=0, atol=1e-9, msg=name)
    pipe = LIDiTPipeline.from_pretrained(second.model)
    assert pipe(["a red circle"], seed=[1], output_type="np").images.shape == (1, 64, 64, 3)


def test_a_damaged_checkpoint_is_passed_over(
    undisturbed: tuple[Recipe, TrainResult], tmp_path: Path
) -> None:
    recipe, _ = undisturbed
    for step in (4, 8):
        shutil.copytree(
            recipe.run_folder / checkpoints.checkpoint_name(step),
            tmp_path / checkpoints.checkpoint_name(step),
        )
    newest = tmp_path / checkpoints.checkpoint_name(8)
    assert checkpoints.newest_complete(tmp_path) == newest
    whole = (newest / "rank-00001.safetensors").read_bytes()
    (newest / "rank-00001.safetensors").write_bytes(whole[: len(whole) // 2])
    assert checkpoints.newest_complete(tmp_path) == tmp_path / checkpoints.checkpoint_name(4)
    (tmp_path / checkpoints.checkpoint_name(4) / "rank-00000.json").unlink()
    with pytest.raises(InputError, match="no checkpoint is whole"):
        checkpoints.newest_complete(tmp_path)


# what a bad loss does to an engine is in test_engine.py; here it goes through the whole job
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_names_the_batch(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    recipe = small_world.recipe(
        tmp_path,
        train={"optimizer": {"lr": 1e30, "gradient_clip": 0.0}, "checkpoint_every": 100},
        engine={"workers": 1},
    )
    with pytest.raises(JobError, match="the loss is"):
        train(recipe)
    (written,) = recipe.run_folder.glob("not-finite-*.json")
    told = json.loads(written.read_text())
    newest = checkpoints.newest_complete(recipe.run_folder)
    assert newest is not None, "the steps before it are lost"
    assert checkpoints.read_position(newest).step == told["step"] > 0
    keys = told["keys"]
    assert len(keys) == 12
    assert set(keys) <= {
        k for u in range(5) for k in small_world.open().samples(u)["key"].to_pylist()
    }
