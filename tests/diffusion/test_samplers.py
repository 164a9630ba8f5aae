"""Sampling: one step against diffusers' own, exact denoisers reach the data, guidance, seeds and
batches.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from lidit.config import ModelSettings, ObjectiveSettings, SamplerSettings
from lidit.diffusion import (
    GuidedPredictor,
    build_objective,
    initial_noise,
    sample,
    seeded_generators,
    timestep_losses,
)
from lidit.diffusion.guidance import rescale
from lidit.errors import InputError
from lidit.models import LIDiT, TextStates

PAIRS = [
    ("ddpm", "ddpm"),
    ("ddpm", "ddim"),
    ("ddpm", "dpm_solver"),
    ("rectified_flow", "euler"),
    ("rectified_flow", "dpm_solver"),
    ("clean", "euler"),
    ("clean", "dpm_solver"),
]
SHAPE = (3, 8, 8)


def objective_of(kind):
    return build_objective(ObjectiveSettings(kind=kind))


def denoiser(objective, x0):
    """The network that knows the data: what it would predict at x_t."""

    def predict(x_t, t):
        level = t[:, None, None, None]
        if objective.kind == "clean":
            return x0
        if objective.kind == "rectified_flow":
            return (x_t - x0) / level
        signal = objective.alphas_cumprod[(t * 1000).round().long()][:, None, None, None]
        return (x_t - signal.sqrt() * x0) / (1 - signal).sqrt()

    return predict


@pytest.mark.parametrize(("kind", "scheduler"), PAIRS)
def test_an_exact_denoiser_reaches_the_data(kind, scheduler):
    objective = objective_of(kind)
    x0 = torch.rand(2, *SHAPE) * 2 - 1
    generators = seeded_generators([3, 4])
    noise = initial_noise(generators, SHAPE)
    found = sample(
        denoiser(objective, x0),
        objective,
        noise,
        SamplerSettings(steps=20, scheduler=scheduler),
        generators,
    )
    assert found.dtype == torch.float32
    # ddpm's last step adds the smallest posterior noise and dpm_solver stops at the smallest level
    torch.testing.assert_close(found, x0, rtol=0, atol=0.02)


def test_one_step_is_diffusers_own():
    """The first step of each sampler, computed with a scheduler built here from its documented
    arguments.
    """
    betas = {
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "timestep_spacing": "trailing",
    }
    flow = FlowMatchEulerDiscreteScheduler(1000)
    flow.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ddpm = DDPMScheduler(1000, clip_sample=False, **betas)
    ddim = DDIMScheduler(1000, clip_sample=False, **betas)
    solver = DPMSolverMultistepScheduler(1000, algorithm_type="dpmsolver++", **betas)
    for scheduler in (ddpm, ddim, solver):
        scheduler.set_timesteps(4)
    noise = torch.randn(1, *SHAPE)
    prediction = torch.randn(1, *SHAPE)
    for kind, name, peer in [
        ("rectified_flow", "euler", flow),
        ("ddpm", "ddpm", ddpm),
        ("ddpm", "ddim", ddim),
        ("ddpm", "dpm_solver", solver),
    ]:
        steps, times = [], []

        def predict(x_t, t, times=times):
            times.append(float(t[0]))
            return prediction

        sample(
            predict,
            objective_of(kind),
            noise,
            SamplerSettings(steps=4, scheduler=name),
            seeded_generators([7]),
            lambda _, latents, steps=steps: steps.append(latents),
        )
        options = {"generator": torch.Generator().manual_seed(7)} if name == "ddpm" else {}
        expected = peer.step(prediction, peer.timesteps[0], noise, **options).prev_sample
        torch.testing.assert_close(steps[0], expected)
        assert times == pytest.approx([float(step) / 1000 for step in peer.timesteps])
        assert len(steps) == 4


def test_clean_prediction_takes_euler_steps_of_its_velocity():
    clean, noise, target = objective_of("clean"), torch.randn(1, *SHAPE), torch.randn(1, *SHAPE)
    steps = []
    sample(
        lambda x_t, t: target,
        clean,
        noise,
        SamplerSettings(steps=4),
        on_step=lambda _, latents: steps.append(latents),
    )
    torch.testing.assert_close(steps[0], 0.75 * noise + 0.25 * target)
    torch.testing.assert_close(steps[-1], target)


@pytest.mark.parametrize("steps", [4, 25, 1000])
@pytest.mark.parametrize("scheduler", ["euler", "dpm_solver"])
def test_the_network_is_asked_at_the_noise_level_that_the_latents_have(scheduler, steps):
    """With data of zeros the latents are t times the noise, on every step; DPM-Solver's own
    timesteps are cut off.
    """
    objective, sampler = (
        objective_of("rectified_flow"),
        SamplerSettings(steps=steps, scheduler=scheduler),
    )
    start = float(objective.scheduler(sampler).sigmas[0])  # DPM-Solver's is 0.999
    noise, times, levels = torch.randn(1, *SHAPE), [], []

    def velocity(x_t, t):
        times.append(float(t[0]))
        levels.append(float((x_t / noise).mean()))
        return noise

    sample(velocity, objective, start * noise, sampler)
    assert times == pytest.approx(levels, abs=1e-4)
    assert min(times) > 0
    drawn = sample(lambda x_t, t: torch.zeros_like(x_t), objective_of("clean"), noise, sampler)
    assert drawn.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "scheduler"), [("ddpm", "euler"), ("rectified_flow", "ddim"), ("clean", "ddpm")]
)
def test_a_scheduler_that_cannot_run_the_objective_is_refused(kind, scheduler):
    with pytest.raises(
        InputError, match=f"{scheduler!r} cannot sample the objective {kind!r}; choose one of"
    ):
        objective_of(kind).scheduler(SamplerSettings(scheduler=scheduler))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = ModelSettings.model_validate({"width": 32, "depth": 1, "heads": 4, "patch_size": 2})
    model = LIDiT.from_settings(settings, {"llm": 12, "other": 16}, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def captions(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = {
        width: torch.randn(2, width, generator=torch.Generator().manual_seed(width))
        for width in (12, 16)
    }
    return {
        name: TextStates.collate(
            [torch.randn(n, width, generator=generator) for n in lengths], shared[width]
        )
        for name, width in (("llm", 12), ("other", 16))
    }


def test_guidance_runs_both_halves_in_one_forward_pass(model):
    text, empty = captions((3, 6)), captions((1,), seed=9)
    x, t = torch.randn(2, *SHAPE), torch.full((2,), 0.5)
    batches = []
    hook = model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    with torch.no_grad():
        guided = GuidedPredictor(model, text, empty, SamplerSettings(guidance_scale=4))(x, t)
        plain = GuidedPredictor(model, text, empty, SamplerSettings(guidance_scale=1))(x, t)
        outside = GuidedPredictor(
            model, text, empty, SamplerSettings(guidance_scale=4, guidance_interval=(0.6, 1))
        )(x, t)
        both = {
            name: TextStates.collate([entry.states[0]] * 2, entry.prefix)
            for name, entry in empty.items()
        }
        conditional, unconditional = model(x, t, text), model(x, t, both)
    hook.remove()
    assert batches == [4, 2, 2, 2, 2]
    torch.testing.assert_close(
        guided, unconditional + 4 * (conditional - unconditional), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(plain, conditional)
    torch.testing.assert_close(outside, conditional)
    assert (guided - conditional).abs().max() > 1e-3


def test_the_empty_caption_is_given_once(model):
    with pytest.raises(ValueError, match="give its states once"):
        GuidedPredictor(model, captions((3, 6)), captions((1, 1)), SamplerSettings())


@pytest.mark.parametrize("edge", [0.2, 0.4, 0.6, 0.8, 0.96])
def test_the_ends_of_the_guidance_interval_belong_to_it(model, edge):
    text, empty, x = captions((3,)), captions((1,), seed=9), torch.randn(1, *SHAPE)
    t = torch.tensor([edge])  # float32, a little above or below the interval's own number
    batches = []
    hook = model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    with torch.no_grad():
        for interval in ((0, edge), (edge, 1), (0, edge - 0.01), (edge + 0.01, 1)):
            GuidedPredictor(model, text, empty, SamplerSettings(guidance_interval=interval))(x, t)
    hook.remove()
    assert batches == [2, 2, 1, 1]


def test_more_steps_than_noise_levels_are_refused():
    few = build_objective(ObjectiveSettings(train_steps=10))
    for name in ("ddim", "ddpm", "dpm_solver"):
        with pytest.raises(
            InputError, match=r"sampler\.steps: 25, but the objective has 10 noise " r"levels"
        ):
            few.scheduler(SamplerSettings(scheduler=name))
        few.scheduler(SamplerSettings(scheduler=name, steps=10))


def test_a_prediction_without_any_deviation_is_left_as_it_is():
    flat = torch.ones(2, *SHAPE)
    assert torch.equal(rescale(flat, flat, 0.0), flat)
    assert torch.isfinite(rescale(torch.zeros(2, *SHAPE), flat, 0.7)).all()


def test_guidance_rescale_restores_the_conditional_deviation(model):
    text, empty = captions((3, 6)), captions((1,), seed=9)
    x, t = torch.randn(2, *SHAPE), torch.full((2,), 0.5)
    with torch.no_grad():
        rescaled = GuidedPredictor(
            model, text, empty, SamplerSettings(guidance_scale=9, guidance_rescale=1)
        )(x, t)
        conditional = model(x, t, text)
    torch.testing.assert_close(
        rescaled.std((1, 2, 3)), conditional.std((1, 2, 3)), rtol=1e-4, atol=1e-5
    )
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    from lidit.diffusion.guidance import rescale

    guided = torch.randn(2, *SHAPE)
    torch.testing.assert_close(
        rescale(guided, conditional, 0.7), rescale_noise_cfg(guided, conditional, 0.7)
    )


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_an_image_does_not_depend_on_its_batch(model, scheduler):
    """Alone, or between others with longer captions: the same seed gives the same image to
    rounding.
    """
    objective, sampler = (
        objective_of("ddpm"),
        SamplerSettings(steps=3, scheduler=scheduler, guidance_scale=2),
    )
    text, empty = captions((3, 9, 5)), captions((1,), seed=9)

    def run(indices):
        chosen = {
            name: TextStates.collate(
                [entry.states[i][entry.mask[i]] for i in indices], entry.prefix
            )
            for name, entry in text.items()
        }
        generators = seeded_generators([10 + i for i in indices])
        noise = initial_noise(generators, SHAPE)
        return sample(
            GuidedPredictor(model, chosen, empty, sampler), objective, noise, sampler, generators
        )

    together = run([0, 1, 2])
    alone = run([2])
    torch.testing.assert_close(
        alone[0], together[2], rtol=1e-3, atol=1e-3 * together.abs().max().item()
    )
    assert (together[0] - together[2]).abs().max() > 0.1


def test_ddpm_without_generators_is_refused():
    with pytest.raises(ValueError, match="one generator per sample"):
        sample(
            lambda x, t: x,
            objective_of("ddpm"),
            torch.randn(1, *SHAPE),
            SamplerSettings(scheduler="ddpm"),
        )


@pytest.mark.parametrize("kind", ["ddpm", "rectified_flow", "clean"])
def test_validation_loss_is_fixed_per_sample_and_timestep(model, kind):
    objective, text = objective_of(kind), captions((3, 9, 5))
    x0 = torch.rand(3, *SHAPE) * 2 - 1
    whole = timestep_losses(lambda x, t: model(x, t, text), objective, x0, [5, 6, 7], count=4)
    again = timestep_losses(lambda x, t: model(x, t, text), objective, x0, [5, 6, 7], count=4)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert whole.shape == (3, 4)
    last = {
        name: TextStates.collate([entry.states[2][entry.mask[2]]], entry.prefix)
        for name, entry in text.items()
    }
    alone = timestep_losses(lambda x, t: model(x, t, last), objective, x0[2:], [7], count=4)
    torch.testing.assert_close(alone[0], whole[2], rtol=1e-3, atol=1e-4)
    other = timestep_losses(lambda x, t: model(x, t, last), objective, x0[2:], [8], count=4)
    assert (other - alone).abs().min() > 1e-5
