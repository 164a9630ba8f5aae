"""Alignment as the engine runs it: pairs from rewards, exact resume within a round, adapters,
refusals.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from pydantic import ValidationError
from safetensors.torch import load_file

from lidit.config.align import Alignment, LoraSettings
from lidit.data.captions import CaptionDraws
from lidit.data.families import Families
from lidit.errors import InputError
from lidit.models import LIDiT
from lidit.models.lora import add_lora
from lidit.pipeline import LIDiTPipeline, PipelineSettings, save_pipeline
from lidit.pipeline.model_encoder import ModelEncoder
from pipelines.training.align import align
from pipelines.training.driver import TrainResult
from pipelines.training.ema import without_trained_numbers
from pipelines.training.rollouts import pair_up
from pipelines.training.train import untrained_model
from tests.helpers.killing import kill_a_worker_after
from tests.helpers.trained import SmallWorld

WEIGHTS = Path("model") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def start(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, none of whose predictions is zero."""
    recipe = small_world.recipe(tmp_path_factory.mktemp("nowhere"))
    families = Families.open(small_world.open(), recipe.data, "pixels")
    torch.manual_seed(0)
    model = untrained_model(recipe, families)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for name, family in families.texts.items():
        model.conditioner.set_statistics(name, family.shared().mean, family.shared().deviation)
    folder: Path = tmp_path_factory.mktemp("start") / "model"
    encoders = [
        ModelEncoder.of_family(encoder, families.texts[encoder.name])
        for encoder in small_world.encoders
    ]
    settings = PipelineSettings(recipe.objective, recipe.sampler, recipe.codec, height=32, width=32)
    save_pipeline(folder, model, encoders, settings, {})
    return folder


def alignment(small_world: SmallWorld, start: Path, output: Path, **changes: Any) -> Alignment:
    tree: dict[str, Any] = {
        "name": "aligned",
        "output": str(output),
        "corpus": str(small_world.corpus),
        "start": str(start),
        "align": {"kl": 1e-4, "strength": 100.0, "away": 1.0},  # brightness differs little
        "reward": {"kind": "function", "function": "tests.helpers.rewards:brightness"},
        "rollout": {"prompts": 32, "pictures": 4, "steps": 4, "sampler": {"steps": 2,
                                                                         "guidance_scale": 1.0}},
        "train": {"steps": 24, "batch_size": 24, "checkpoint_every": 2, "log_every": 2,
                  "ema_decay": 0.5,
                  "optimizer": {"lr": 1e-2}},
        "engine": {"workers": 2, "zero_stage": 2},
    }  # fmt: skip
    for section, values in changes.items():
        tree[section] = (
            {**tree[section], **values} if isinstance(tree.get(section), dict) else values
        )
    return Alignment.model_validate(tree)


def logged(result: TrainResult, name: str) -> list[float]:
    return [
        point.value
        for point in MlflowClient(result.tracking_uri).get_metric_history(result.run_id, name)
    ]


@pytest.fixture(scope="module")
def aligned(
    small_world: SmallWorld, start: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Alignment, TrainResult]:
    recipe = alignment(
        small_world, start, tmp_path_factory.mktemp("runs"), watch={"every": 24, "per_tag": 1}
    )
    return recipe, align(recipe)


@pytest.mark.slow
def test_the_reward_rises_and_the_distance_begins_at_nothing(
    aligned: tuple[Alignment, TrainResult],
) -> None:
    _, result = aligned
    rewards, distances = (
        logged(result, "rollout/reward"),
        logged(result, "rollout/distance_to_start"),
    )
    assert len(rewards) == len(distances) == 6
    assert rewards[-1] > rewards[0]
    assert distances[0] < 1e-9 < distances[1]


@pytest.mark.slow
def test_held_out_prompts_are_watched_from_the_start_to_the_end(
    aligned: tuple[Alignment, TrainResult],
) -> None:
    _, result = aligned
    assert len(logged(result, "watch/strict")) == 2
    assert all(0 <= value <= 1 for value in logged(result, "watch/lax"))


@pytest.mark.slow
def test_the_result_is_an_ordinary_model_that_names_its_start(
    aligned: tuple[Alignment, TrainResult], start: Path
) -> None:
    recipe, result = aligned
    assert (result.step, result.trained) == (24, True)
    assert not align(recipe).trained
    pipe = LIDiTPipeline.from_pretrained(result.model)
    assert pipe.sampler.steps == 3
    before, after = load_file(start / WEIGHTS), load_file(result.model / WEIGHTS)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    run = MlflowClient(result.tracking_uri).get_run(result.run_id)
    assert run.data.tags["lidit.job"] == "align"
    assert run.data.tags["lidit.start"] in (result.model / "README.md").read_text()


@pytest.mark.slow
def test_a_run_killed_within_a_round_ends_with_the_same_weights(
    aligned: tuple[Alignment, TrainResult], tmp_path: Path
) -> None:
    recipe, result = aligned
    again = recipe.model_copy(update={"output": str(tmp_path)})
    pids: list[int] = []
    hunter: threading.Thread = kill_a_worker_after(
        again.run_folder, 2, pids
    )  # rounds begin at 0 and 4
    killed = align(again)
    hunter.join()
    assert pids, "nothing was killed"
    straight, resumed = load_file(result.model / WEIGHTS), load_file(killed.model / WEIGHTS)
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_adapters_are_trained_alone_and_published_merged_and_apart(
    small_world: SmallWorld, start: Path, tmp_path: Path, zero: int
) -> None:
    recipe = alignment(small_world, start, tmp_path, lora={"rank": 2}, align={"kind": "dpo",
                                                                              "kl": 0.0},
                       engine={"workers": 1, "zero_stage": zero})  # fmt: skip
    result = align(recipe)
    before, after = load_file(start / WEIGHTS), load_file(result.model / WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(".weight") for name in changed)

    widths = LIDiTPipeline.from_pretrained(start).model.config.encoders
    states = {name: torch.randn(3, width) for name, width in widths.items()}
    drawn = []
    for folder, adapter in ((result.model, None), (start, result.model / "lora")):
        pipe = LIDiTPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        if adapter:
            pipe.load_lora_weights(adapter)
        text = {name: entry.collate([states[name]]) for name, entry in pipe.encoders.items()}
        drawn.append(np.asarray(pipe(states=text, seed=0, output_type="pt").images))
    np.testing.assert_allclose(drawn[0], drawn[1], rtol=0, atol=1e-4)


def test_weights_below_adapters_wait_with_their_numbers_for_the_average(start: Path) -> None:
    model = LIDiT.load(start / "model")
    add_lora(model, LoraSettings(rank=2))
    frozen = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    without_trained_numbers(model)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.buffers())
    for name, parameter in model.named_parameters():
        assert parameter.is_meta == ("lora_" in name)
        assert parameter.is_meta or torch.equal(parameter, frozen[name])


def test_captions_are_drawn_anew_each_round_and_always_the_same(small_world: SmallWorld) -> None:
    corpus = small_world.open()
    fingerprints = {family.name: family.fingerprint for family in corpus.text_families()}
    draws = CaptionDraws(corpus, fingerprints, seed=3)
    first, second = draws.drawn(0, 40), draws.drawn(1, 40)
    assert [c.record for c in first] == [
        c.record for c in CaptionDraws(corpus, fingerprints, seed=3).drawn(0, 40)
    ]
    assert [c.key for c in first] != [c.key for c in second]
    assert {c.unit for c in first} == set(range(corpus.num_units))
    for caption in first:
        assert (
            caption.record["prompt"] == corpus.captions(caption.unit)["text"][caption.index].as_py()
        )
        assert caption.record["geneval"]["include"]
    states = draws.states(first)
    for name, family in draws.texts.items():
        own = family.read(first[7].unit, [first[7].index])[0]
        assert torch.equal(states[name].states[7][: len(own)], own)
        assert int(states[name].mask[7].sum()) == len(own)


def test_pairs_are_best_and_worst_while_they_differ() -> None:
    rewards = np.array([[0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.2, 0.4, 0.1]])
    assert pair_up(rewards) == [(0, 1, 2, 1.0), (0, 3, 0, 1.0), (2, 2, 0, 0.4), (2, 1, 3, 0.1)]


def test_what_cannot_be_aligned_is_refused_before_anything_starts(
    small_world: SmallWorld, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"tests\.helpers\.rewards:absent cannot be imported"):
        align(alignment(small_world, start, tmp_path,
                        reward={"kind": "function",
                                "function": "tests.helpers.rewards:absent"}))  # fmt: skip
    with pytest.raises(InputError, match="not a corpus"):
        align(alignment(small_world, start, tmp_path, prompts=str(tmp_path)))
    assert not (tmp_path / "aligned").exists()
    for wrong, message in (({"train": {"validate_every": 2}}, "watch.every"),
                           ({"train": {"init_from": "x"}}, "start"),
                           ({"lora": {}, "engine": {"zero_stage": 3}}, "lora"),
                           ({"rollout": {"prompts": 5}, "engine": {"zero_stage": 3}}, "divisible"),
                           ({"rollout": {"pictures": 1}},
                            "greater than or equal to 2")):  # fmt: skip
        with pytest.raises(ValidationError, match=message):
            alignment(small_world, start, tmp_path, **wrong)
