"""Noising, targets and timesteps against diffusers' schedulers and against the formulas."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lidit.config import ObjectiveSettings
from lidit.diffusion import build_objective
from lidit.diffusion.objectives import BETA_END, BETA_START

KINDS = ["ddpm", "rectified_flow", "clean"]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 4, 6, generator=generator), torch.randn(
        5, 3, 4, 6, generator=generator
    )


def test_ddpm_noising_is_diffusers(pair):
    x0, noise = pair
    steps = torch.tensor([0, 1, 500, 998, 999])
    scheduler = DDPMScheduler(
        1000, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="linear"
    )
    objective = build_objective(ObjectiveSettings(kind="ddpm"))
    torch.testing.assert_close(
        objective.add_noise(x0, noise, steps / 1000),
        scheduler.add_noise(x0, noise, steps),
        rtol=1e-5,
        atol=1e-6,
    )
    reached = objective.timesteps(torch.tensor([0.0, 0.0015, 0.5, 0.9985, 1 - 1e-7]))
    torch.testing.assert_close(reached, steps / 1000)


@pytest.mark.parametrize("kind", ["rectified_flow", "clean"])
def test_flow_noising_is_diffusers(pair, kind):
    x0, noise = pair
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    t = torch.tensor([0.001, 0.2, 0.5, 0.9, 1.0])
    objective = build_objective(ObjectiveSettings(kind=kind))
    torch.testing.assert_close(
        objective.add_noise(x0, noise, t), scheduler.scale_noise(x0, t * 1000, noise)
    )


def test_losses_are_their_formulas(pair):
    x0, noise = pair
    prediction = torch.randn_like(x0)
    t = torch.tensor([0.02, 0.1, 0.5, 0.9, 1.0])
    expected = {
        "ddpm": (prediction - noise) ** 2,
        "rectified_flow": (prediction - (noise - x0)) ** 2,
        "clean": ((prediction - x0) / t.clamp_min(0.1)[:, None, None, None]) ** 2,
    }
    for kind in KINDS:
        objective = build_objective(ObjectiveSettings(kind=kind))
        loss = objective.loss(
            prediction.bfloat16().float(), x0, noise, t, objective.add_noise(x0, noise, t)
        )
        assert loss.shape == (5,)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(
            objective.loss(prediction, x0, noise, t, objective.add_noise(x0, noise, t)),
            expected[kind].mean((1, 2, 3)),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_perfect_prediction_has_no_loss_and_every_other_has(pair, kind):
    x0, noise = pair
    objective = build_objective(ObjectiveSettings(kind=kind))
    t = torch.full((5,), 0.5)
    perfect = {"ddpm": noise, "rectified_flow": noise - x0, "clean": x0}[kind]
    x_t = objective.add_noise(x0, noise, t)
    assert objective.loss(perfect, x0, noise, t, x_t).max() == 0
    assert objective.loss(perfect + 0.1, x0, noise, t, x_t).min() > 0


def test_clean_loss_is_the_velocity_loss_above_the_floor(pair):
    """|x_hat - x|^2 / t^2 is the squared error of the velocity (x_t - x_hat) / t."""
    x0, noise = pair
    clean, flow = (
        build_objective(ObjectiveSettings(kind=kind)) for kind in ("clean", "rectified_flow")
    )
    t, guess = torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0]), torch.randn_like(x0)
    x_t = clean.add_noise(x0, noise, t)
    velocity = clean.scheduler_input(guess, x_t, t)
    torch.testing.assert_close(
        clean.loss(guess, x0, noise, t, x_t),
        flow.loss(velocity, x0, noise, t, x_t),
        rtol=1e-4,
        atol=1e-4,
    )


def test_timesteps_follow_their_distribution():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    uniform = build_objective(
        ObjectiveSettings(kind="rectified_flow", timesteps="uniform")
    ).timesteps(u)
    torch.testing.assert_close(uniform, u.float())
    for kind in ("rectified_flow", "clean"):
        t = build_objective(ObjectiveSettings(kind=kind)).timesteps(u)
        logits = torch.logit(t.double())
        assert abs(logits.mean()) < 1e-3
        assert abs(logits.std() - 1) < 1e-3
        assert t.min() > 0
        assert t.max() < 1
    edges = build_objective(ObjectiveSettings(kind="clean")).timesteps(
        torch.tensor([0.0, 1 - 2**-24])
    )
    assert ((edges > 0) & (edges < 1)).all()
    ddpm = build_objective(ObjectiveSettings(kind="ddpm")).timesteps(u)
    counts = torch.bincount((ddpm * 1000).round().long(), minlength=1000)
    assert counts.tolist() == [100] * 1000
