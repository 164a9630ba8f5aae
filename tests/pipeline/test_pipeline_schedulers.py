"""`pipe.scheduler`: read, swapped for others of diffusers, and given steps of its own."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from lidit.errors import InputError
from tests.helpers.random_pipeline import random_pipeline, random_states

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def drawn(pipeline, length=3, **options):
    states = {
        name: pipeline.encoders[name].collate([row])
        for name, row in random_states(length, length).items()
    }
    return pipeline(states=states, **({"seed": 0} | options), output_type="latent").images


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("clean", FlowMatchEulerDiscreteScheduler),
        ("rectified_flow", FlowMatchEulerDiscreteScheduler),
        ("ddpm", DDIMScheduler),
    ],
)
def test_the_models_own_can_be_read_and_put_back(kind, scheduler):
    pipeline = random_pipeline(kind)
    own, expected = pipeline.scheduler, drawn(pipeline)
    assert type(own) is scheduler
    pipeline.scheduler = scheduler.from_config(own.config)
    assert torch.equal(drawn(pipeline), expected)
    pipeline.scheduler = None
    assert torch.equal(drawn(pipeline), expected)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
        (FlowMatchHeunDiscreteScheduler, {}),
        (UniPCMultistepScheduler, FLOW),
        (DPMSolverMultistepScheduler, FLOW),
    ],
    ids=["shifted", "heun", "unipc", "dpm"],
)
def test_others_walk_to_the_same_picture(scheduler, options):
    """With many steps every solver of one equation ends at one place; with few they differ."""
    pipeline = random_pipeline("rectified_flow")
    own = drawn(pipeline, num_inference_steps=60)
    few = drawn(pipeline, num_inference_steps=4)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    other = drawn(pipeline, num_inference_steps=40)
    assert (other - own).abs().mean() < 0.05 * own.abs().mean()
    assert (drawn(pipeline, num_inference_steps=4) - few).abs().max() > 1e-3


def test_a_clean_prediction_becomes_the_velocity_that_others_take():
    pipeline = random_pipeline("clean")
    expected = drawn(pipeline, scheduler="dpm_solver")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **FLOW)
    assert torch.equal(drawn(pipeline), expected)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_schedulers_that_scale_the_latents_fit_noise_prediction(scheduler):
    """They hold latents of a deviation of a hundred, and scale what the network sees."""
    pipeline = random_pipeline("ddpm")
    own = drawn(pipeline, num_inference_steps=60, scheduler="dpm_solver")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    other = drawn(pipeline, num_inference_steps=40)
    assert (other - own).abs().mean() < 0.1 * own.abs().mean()


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_noise_on_the_way_comes_from_the_images_own_seed(scheduler):
    pipeline = random_pipeline("ddpm")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    torch.manual_seed(1)
    first = drawn(pipeline, num_images_per_prompt=2)
    torch.manual_seed(2)
    assert torch.equal(drawn(pipeline, num_images_per_prompt=2), first)
    torch.testing.assert_close(drawn(pipeline, seed=1), first[1:], rtol=1e-3, atol=1e-3)


def test_a_name_in_the_call_wins_and_calls_leave_the_scheduler_alone():
    pipeline = random_pipeline("clean")
    expected = drawn(pipeline, scheduler="euler")
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    assert torch.equal(drawn(pipeline, scheduler="euler"), expected)
    before = pipeline.scheduler.timesteps.clone()
    first = drawn(pipeline, num_inference_steps=3)
    assert torch.equal(pipeline.scheduler.timesteps, before)
    assert torch.equal(drawn(pipeline, num_inference_steps=3), first)


def test_a_swapped_scheduler_is_not_saved(pipe, tmp_path):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "scheduler").exists()
    assert type(type(pipe).from_pretrained(tmp_path).scheduler) is FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize(
    ("kind", "scheduler", "message"),
    [
        ("clean", DDIMScheduler(), "walks straight from noise to data; give a FlowMatch scheduler"),
        ("clean", DPMSolverMultistepScheduler(), "use_flow_sigmas=True"),
        ("ddpm", FlowMatchEulerDiscreteScheduler(), "prediction_type epsilon"),
        ("ddpm", DDIMScheduler(prediction_type="v_prediction"), "prediction_type epsilon"),
        (
            "ddpm",
            DDIMScheduler(beta_schedule="scaled_linear"),
            "its noise levels are not the model's",
        ),
        ("ddpm", DDIMScheduler(num_train_timesteps=500), "its noise levels are not the model's"),
        ("clean", "euler", "scheduler str is no scheduler of diffusers"),
        ("clean", AutoencoderKL, "is no scheduler of diffusers"),
    ],
)
def test_a_scheduler_of_another_path_is_refused(kind, scheduler, message):
    pipeline = random_pipeline(kind)
    with pytest.raises(InputError, match=message):
        pipeline.scheduler = scheduler
    drawn(pipeline)


def test_steps_can_be_chosen_one_by_one():
    pipeline = random_pipeline("clean")
    expected = drawn(pipeline, num_inference_steps=4)
    assert torch.equal(drawn(pipeline, sigmas=[1.0, 0.75, 0.5, 0.25]), expected)
    assert torch.equal(drawn(pipeline, timesteps=[1000, 750, 500, 250]), expected)
    assert (drawn(pipeline, sigmas=[1.0, 0.9, 0.8, 0.7]) - expected).abs().max() > 1e-3
    assert pipeline.num_timesteps == 4
    drawn(pipeline, sigmas=[1.0, 0.5])
    assert pipeline.num_timesteps == 2


def test_a_scheduler_that_chooses_its_steps_itself_says_so():
    pipeline = random_pipeline("ddpm")
    with pytest.raises(
        InputError, match="scheduler DDIMScheduler takes no timesteps; choose another scheduler"
    ):
        drawn(pipeline, timesteps=[999, 500])
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    drawn(pipeline, timesteps=[999, 500, 1])
    assert pipeline.num_timesteps == 3
    with pytest.raises(InputError, match="cannot take these steps"):
        drawn(pipeline, timesteps=[1, 500, 999])
