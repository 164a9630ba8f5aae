"""Distilling: what is refused, what the student starts as, and runs that end in an ordinary model
folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lidit.config.distill import Distillation
from lidit.config.settings import validate
from lidit.errors import InputError
from lidit.models import LIDiT
from lidit.pipeline import LIDiTPipeline
from lidit.store import digest_of
from pipelines.evaluation.models import tracking_of, weights_digest
from pipelines.training.distill import check_teacher, distill, student_network, student_recipe
from tests.helpers.random_model import WEIGHTS, write_model
from tests.helpers.trained import SmallWorld

PROGRESSIVE = {"kind": "progressive", "sampler_steps": 2}


def distillation(
    world: SmallWorld, teacher: Path, output: Path, *stages: dict[str, object]
) -> Distillation:
    tree = {
        "name": "student",
        "teacher": str(teacher),
        "output": str(output),
        "corpus": str(world.corpus),
        "stages": list(stages),
        "data": {"window_units": 2},
        "train": {"steps": 4, "batch_size": 12, "checkpoint_every": 2, "log_every": 1,
                  "ema_decay": 0.9,
                  "optimizer": {"lr": 1e-3}},
        "engine": {"workers": 2, "zero_stage": 2},
    }  # fmt: skip
    return validate(Distillation, tree, "test")


@pytest.fixture(scope="module")
def teacher(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(small_world, tmp_path_factory.mktemp("teacher"), seed=3)


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"kind": "progressive"}, "sampler_steps: say how many steps"),
        (
            {"kind": "progressive", "sampler_steps": 4, "teacher_steps": 6},
            "6 is no multiple of sampler_steps = 4",
        ),
        ({"kind": "guidance", "teacher_steps": 6}, "guidance is learnt at every noise level"),
        ({"kind": "guidance", "guidance_range": [4, 1]}, "give the smaller scale first"),
        ({"kind": "magic"}, "'guidance', 'progressive' or 'consistency'"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stage: dict[str, object], reason: str) -> None:
    tree = {"name": "n", "teacher": "t", "corpus": "c", "stages": [stage]}
    with pytest.raises(InputError, match=reason):
        validate(Distillation, tree, "recipe.yaml")


def test_a_stage_is_the_teachers_recipe_with_a_sampler_of_one_evaluation_per_step(
    small_world: SmallWorld, teacher: Path, tmp_path: Path
) -> None:
    stages = [
        {"kind": "guidance", "train_steps": 7},
        {"kind": "guidance", "guidance_range": [1, 4]},
        PROGRESSIVE,
    ]
    recipe = distillation(small_world, teacher, tmp_path, *stages)
    made = [student_recipe(recipe, stage, "student", teacher) for stage in recipe.stages]
    own = LIDiTPipeline.from_pretrained(teacher)
    assert [it.train.steps for it in made] == [7, 4, 4]
    assert [(it.sampler.steps, it.sampler.guidance_scale) for it in made] == [
        (own.sampler.steps, 1.0),
        (own.sampler.steps, own.sampler.guidance_scale),
        (2, 1.0),
    ]
    for it in made:
        assert it.objective == own.objective.settings
        check_teacher(it, small_world.open())
    told = student_network(own.model, made[1])
    assert told.takes_guidance
    for name, value in own.model.state_dict().items():
        assert torch.equal(told.state_dict()[name], value)
    assert not student_network(own.model, made[0]).takes_guidance
    assert student_network(told, made[2]).takes_guidance  # of a teacher that takes it


def test_a_corpus_with_other_states_than_the_teachers_is_refused(
    small_world: SmallWorld, teacher: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "model"))
    path = other / "encoders" / "llama.json"
    facts = json.loads(path.read_text())
    facts["spec"]["weights_sha256"] = "0" * 64
    facts["fingerprint"] = digest_of(facts["spec"])
    path.write_text(json.dumps(facts))
    with pytest.raises(
        InputError, match=r"'llama' are not those that(.|\n)*weights_sha256: \"0000"
    ):
        distill(distillation(small_world, other, tmp_path, PROGRESSIVE))
    assert not (tmp_path / "student").exists()


def test_a_teacher_of_another_shape_than_the_latents_is_refused(
    small_world: SmallWorld, teacher: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "model"))
    config = {k: v for k, v in LIDiT.load(other / "model").config.items() if not k.startswith("_")}
    LIDiT(**{**config, "channels": 4}).save_pretrained(other / "model")
    with pytest.raises(InputError, match=r"latents have 3 channels, .* draws 4"):
        distill(distillation(small_world, other, tmp_path, PROGRESSIVE))


def test_steps_that_the_objective_cannot_take_are_refused(
    small_world: SmallWorld, teacher: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "model"))
    index = json.loads((other / "model_index.json").read_text())
    index["objective"] = {"kind": "ddpm", "train_steps": 8}
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="finer than the objective's 8 noise levels"):
        distill(distillation(small_world, other, tmp_path, {**PROGRESSIVE, "teacher_steps": 20}))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three trainings, one after the other
def test_a_chain_of_students_ends_in_an_ordinary_folder_and_goes_on_bit_by_bit(
    small_world: SmallWorld, teacher: Path, tmp_path: Path
) -> None:
    stages = [
        {"kind": "guidance", "train_steps": 2},
        {"kind": "consistency", "sampler_steps": 2, "teacher_steps": 6},
    ]
    recipe = distillation(small_world, teacher, tmp_path, *stages)
    first, last = distill(recipe)
    assert (first.model.parent.name, last.model.parent.name) == ("student-stage1", "student")
    facts = json.loads((last.model.parent / "run.json").read_text())
    assert facts["teacher"] == weights_digest(first.model)
    assert facts["config"]["distill"]["kind"] == "consistency"
    assert weights_digest(first.model) in (last.model / "README.md").read_text()
    assert tracking_of(last.model) == recipe.tracking

    # Drawn as its folder says: two steps, one evaluation each.
    pipe, passes = LIDiTPipeline.from_pretrained(last.model), []
    pipe.model.transformer.register_forward_pre_hook(
        lambda _, inputs: passes.append(len(inputs[0]))
    )
    pipe(["a red circle", "a blue square"], seed=1)
    assert passes == [2, 2]
    before, after = load_file(first.model / WEIGHTS), load_file(last.model / WEIGHTS)
    assert any(not torch.equal(before[name], after[name]) for name in before)

    # The same again does nothing; from a checkpoint it goes on to the same bits.
    assert [result.trained for result in distill(recipe)] == [False, False]
    shutil.rmtree(last.model)
    shutil.rmtree(last.model.parent / "step-000000004")
    assert [result.trained for result in distill(recipe)] == [False, True]
    for name, value in load_file(last.model / WEIGHTS).items():
        assert torch.equal(value, after[name])

    # Another teacher is drift.
    other = write_model(small_world, tmp_path / "other", seed=4)
    with pytest.raises(InputError, match=r"teacher: "):
        distill(distillation(small_world, other, tmp_path, *stages))
