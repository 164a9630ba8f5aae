"""What a student is taught: closed forms against float64 and diffusers' own steps, and each kind
against its words.
"""

from __future__ import annotations

import pytest
import torch

from lidit.config import ObjectiveSettings, SamplerSettings
from lidit.config.distill import DistillSettings
from lidit.diffusion import GuidedPredictor, Objective, build_objective, sample
from lidit.diffusion.distillation import Lessons, Teacher
from lidit.diffusion.jumps import JumpGrid, jump, jump_target, regression
from lidit.errors import InputError
from lidit.models import LIDiT, TextStates
from tests.helpers.random_pipeline import random_pipeline, random_states

KINDS = ["clean", "rectified_flow", "ddpm"]
SHAPE = (3, 16, 16)


def objective_of(kind: str) -> Objective:
    return build_objective(ObjectiveSettings(kind=kind, timesteps="uniform"))


def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Some prediction that depends on both."""
    return torch.sin(3 * x_t + 5 * t.view(-1, 1, 1, 1))


def exact_shares(kind: str, t: float) -> tuple[float, float]:
    """Data's and noise's share at t in float64, from the papers' formulas."""
    if kind != "ddpm":
        return 1 - t, t
    if t < 0:
        return 1.0, 0.0
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal = float(torch.cumprod(1 - betas, 0)[round(t * 1000)])
    return signal**0.5, (1 - signal) ** 0.5


def exact_data(kind: str, prediction: torch.Tensor, x_t: torch.Tensor, t: float) -> torch.Tensor:
    """The data that a prediction points to, float64."""
    data, noise = exact_shares(kind, t)
    return {
        "clean": prediction,
        "rectified_flow": x_t - t * prediction,
        "ddpm": (x_t - noise * prediction) / data,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "levels", [(0.999, 0.874, 0.749), (0.5, 0.375, 0.25), (0.249, 0.124, None)]
)
def test_two_steps_of_the_teacher_become_one_as_salimans_and_ho_have_it(kind, levels):
    objective = objective_of(kind)
    levels = [objective.clean_end if level is None else level for level in levels]
    begin, middle, end = levels
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))

    exact = x.double()
    for t, s in ((begin, middle), (middle, end)):
        (data_t, noise_t), (data_s, noise_s) = exact_shares(kind, t), exact_shares(kind, s)
        x0 = exact_data(kind, network(exact, torch.full((2,), t, dtype=torch.float64)), exact, t)
        exact = data_s * x0 + noise_s / noise_t * (exact - data_t * x0)
    (data_t, noise_t), (data_s, noise_s) = exact_shares(kind, begin), exact_shares(kind, end)
    # Algorithm 2 of arXiv 2202.00512: the data whose one step lands where two have led.
    x0 = (exact - noise_s / noise_t * x.double()) / (data_s - noise_s / noise_t * data_t)
    expected = {
        "clean": x0,
        "rectified_flow": (x.double() - x0) / begin,
        "ddpm": (x.double() - data_t * x0) / noise_t,
    }[kind]

    t, u, s = (torch.full((2,), level) for level in levels)
    half = jump(objective, network(x, t), x, t, u)
    landed = jump(objective, network(half, u), half, u, s)
    torch.testing.assert_close(landed.double(), exact, rtol=0, atol=2e-4)
    found = jump_target(objective, landed, x, t, s)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(jump(objective, found, x, t, s), landed, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "teacher_steps"), [(4, 8), (2, 8), (1, 2), (5, 25)])
def test_a_student_that_learnt_its_targets_samples_what_the_teacher_samples(
    kind, steps, teacher_steps
):
    """Both by diffusers' schedulers, to the last step; the student knows nothing but
    `jump_target`.
    """
    objective, grid = objective_of(kind), JumpGrid.of(objective_of(kind), steps, teacher_steps)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    expected = sample(network, objective, noise, SamplerSettings(steps=teacher_steps))
    begins = grid.levels[:, 0].tolist()

    def student(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        levels = grid.levels[min(range(steps), key=lambda i: abs(begins[i] - float(t[0])))]
        walked = x_t
        for begin, end in zip(levels[:-1].expand(2, -1).T, levels[1:].expand(2, -1).T):
            walked = jump(objective, network(walked, begin), walked, begin, end)
        return jump_target(objective, walked, x_t, t, levels[-1:].expand(2))

    found = sample(student, objective, noise, SamplerSettings(steps=steps))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 if kind == "ddpm" else 1e-4)


def test_steps_that_cannot_be_nested_are_refused():
    with pytest.raises(
        InputError, match="teacher_steps: 9 is no multiple of the student's 4 steps"
    ):
        JumpGrid.of(objective_of("clean"), 4, 9)
    few = build_objective(ObjectiveSettings(kind="ddpm", train_steps=10))
    with pytest.raises(InputError, match="finer than the objective's 10 noise levels"):
        JumpGrid.of(few, 4, 32)


def test_errors_weigh_as_in_training_and_where_noise_is_predicted_as_in_the_data():
    prediction, target = torch.full((2, *SHAPE), 3.0), torch.full((2, *SHAPE), 1.0)
    t = torch.tensor([0.05, 0.5])
    for kind in KINDS:
        objective = objective_of(kind)
        data, noise = torch.full((2, *SHAPE), 1.0), torch.zeros(2, *SHAPE)
        x_t = objective.add_noise(data, noise, t)
        own = objective.loss(prediction, data, noise, t, x_t)
        goal = {"clean": data, "rectified_flow": noise - data, "ddpm": noise}[kind]
        torch.testing.assert_close(regression(objective, prediction, goal, t, landing=False), own)
    ddpm = objective_of("ddpm")
    levels = torch.tensor([0.05, 0.8])
    found = regression(ddpm, prediction, target, levels, landing=True)
    data, noise = ddpm.path(levels)
    # max(SNR, 1) times the squared error of the data, which is that of the noise times 1 / SNR.
    ratio = (data / noise).square()
    torch.testing.assert_close(found, ratio.clamp_min(1) * 4 / ratio)
    assert float(found[0]) == pytest.approx(4)


# -- the three kinds, on a network ----------------------------------------------------------------


def setting(
    kind: str = "clean", **sampler: object
) -> tuple[Teacher, dict[str, TextStates], torch.Tensor, torch.Tensor]:
    """A teacher, captions, data and noise of four samples."""
    pipeline = random_pipeline(kind)
    rows = [random_states(3 + number, number) for number in range(4)]
    text = {
        name: entry.collate([row[name] for row in rows])
        for name, entry in pipeline.encoders.items()
    }
    empty = {name: entry.collate([entry.empty]) for name, entry in pipeline.encoders.items()}
    settings = SamplerSettings.model_validate({"steps": 4, "guidance_scale": 2.5, **sampler})
    generator = torch.Generator().manual_seed(5)
    x0, noise = (
        torch.randn(4, *SHAPE, generator=generator),
        torch.randn(4, *SHAPE, generator=generator),
    )
    return Teacher(pipeline.model, pipeline.objective, empty, settings), text, x0, noise


def no_student(x_t: torch.Tensor, t: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
    raise AssertionError("this kind does not ask the student")


@pytest.mark.parametrize("sampler", [{}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7},
                                     {"guidance_interval": (0.4, 0.8)}])  # fmt: skip
def test_the_teacher_predicts_as_its_own_sampler_does_whatever_timesteps_its_samples_have(sampler):
    teacher, text, x0, _ = setting(**sampler)
    levels = torch.tensor([0.2, 0.4, 0.8, 0.9])
    found = teacher(x0, levels, text)
    for place, level in enumerate(levels):
        predict = GuidedPredictor(teacher.model, text, teacher.empty, teacher.sampler)
        with torch.no_grad():
            alone = predict(x0, level.expand(4))
        torch.testing.assert_close(found[place], alone[place], rtol=1e-4, atol=1e-5)
    plain = teacher.model(x0, levels, text)
    assert torch.allclose(found, plain, atol=1e-6) == (sampler.get("guidance_scale") == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_taught_at_every_noise_level(kind):
    teacher, text, x0, noise = setting(kind)
    u = torch.tensor([0.01, 0.3, 0.6, 0.99])
    example = Lessons(DistillSettings(kind="guidance"), teacher).example(
        x0, noise, u, text, no_student
    )
    t = teacher.objective.timesteps(u)
    assert torch.equal(example.t, t)
    assert torch.equal(example.target, teacher(teacher.objective.add_noise(x0, noise, t), t, text))


@pytest.mark.parametrize("kind", KINDS)
def test_progressive_teaches_where_the_guided_walk_leads(kind):
    teacher, text, x0, noise = setting(kind)
    settings = DistillSettings(kind="progressive", sampler_steps=2, teacher_steps=4)
    u = torch.tensor([0.0, 0.2, 0.49, 0.4])  # all in the student's first step
    example = Lessons(settings, teacher).example(x0, noise, u, text, no_student)
    empty = teacher.empty
    predict = GuidedPredictor(teacher.model, text, empty, teacher.sampler)
    landed: list[torch.Tensor] = []
    sample(
        predict,
        teacher.objective,
        example.x_t,
        SamplerSettings(steps=4),
        on_step=lambda _, x: landed.append(x),
    )
    end = JumpGrid.of(teacher.objective, 2, 4).levels[0, -1].expand(4)
    found = jump(teacher.objective, example.target, example.x_t, example.t, end)
    torch.testing.assert_close(found, landed[1], rtol=1e-3, atol=1e-3)
    late = Lessons(settings, teacher).example(x0, noise, u + 0.5, text, no_student)
    assert float(late.t[0]) == pytest.approx(float(end[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_teaches_one_step_of_the_teacher_and_the_students_jump(kind):
    teacher, text, x0, noise = setting(kind)
    objective = teacher.objective
    settings = DistillSettings(kind="consistency", sampler_steps=2, teacher_steps=6)
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def student(x_t: torch.Tensor, t: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
        asked.append((x_t, t))
        return network(x_t, t)

    # the first step's three levels, and the second step's first
    u = torch.tensor([0.05, 0.2, 0.4, 0.6])
    example = Lessons(settings, teacher).example(x0, noise, u, text, student)
    levels = JumpGrid.of(objective, 2, 6).levels
    t = torch.stack([levels[0, 0], levels[0, 1], levels[0, 2], levels[1, 0]])
    then = torch.stack([levels[0, 1], levels[0, 2], levels[0, 3], levels[1, 1]])
    end = torch.stack([*[levels[0, 3]] * 3, levels[1, 3]])
    assert torch.equal(example.t, t)
    stepped = jump(objective, teacher(example.x_t, t, text), example.x_t, t, then)
    torch.testing.assert_close(asked[0][0], stepped)
    onward = jump(objective, network(stepped, then), stepped, then, end)
    expected = torch.stack([onward[0], onward[1], stepped[2], onward[3]])
    found = jump(objective, example.target, example.x_t, t, end)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_is_taught_depends_on_no_other_sample_and_on_nothing_but_the_batch():
    teacher, text, x0, noise = setting()
    lessons = Lessons(
        DistillSettings(kind="progressive", sampler_steps=2, teacher_steps=4), teacher
    )
    u = torch.tensor([0.1, 0.9, 0.3, 0.7])
    one, two = (lessons.example(x0, noise, u, text, no_student) for _ in range(2))
    assert torch.equal(one.target, two.target)
    half = {n: TextStates(s.states[2:], s.mask[2:], s.prefix) for n, s in text.items()}
    part = lessons.example(x0[2:], noise[2:], u[2:], half, no_student)
    torch.testing.assert_close(part.target, one.target[2:], rtol=1e-4, atol=1e-5)


# -- the guidance scale as an input ---------------------------------------------------------------


def with_input(teacher: Teacher) -> LIDiT:
    """The teacher's network with a guidance input, as a student starts."""
    config = {
        name: value for name, value in teacher.model.config.items() if not name.startswith("_")
    }
    student = LIDiT(**{**config, "guidance_input": True}).eval()
    student.load_state_dict(teacher.model.state_dict(), strict=False)
    return student


def test_a_new_guidance_input_changes_no_bit_of_the_prediction():
    teacher, text, x0, _ = setting()
    student, t = with_input(teacher), torch.tensor([0.1, 0.4, 0.7, 1.0])
    with torch.no_grad():
        plain = teacher.model(x0, t, text)
        assert torch.equal(student(x0, t, text), plain)
        assert torch.equal(student(x0, t, text, guidance=torch.tensor([1.0, 2.0, 5.0, 9.0])), plain)
        student.transformer.guidance_embedder.contract.weight.normal_()
        told = student(x0, t, text, guidance=torch.tensor([1.0, 1.0, 5.0, 9.0]))
        none = student(x0, t, text)
    assert torch.equal(told[:2], none[:2])  # 1 is no guidance
    assert not torch.allclose(told[2:], none[2:], atol=1e-3)


def test_a_model_that_takes_the_scale_is_asked_once_and_told_it_inside_the_interval():
    teacher, text, x0, _ = setting()
    student, asked = with_input(teacher), []
    student.transformer.register_forward_pre_hook(
        lambda _, inputs: asked.append((len(inputs[0]), inputs[3].tolist()))
    )
    sampler = SamplerSettings(guidance_scale=2.5, guidance_interval=(0.4, 0.8))
    predict = GuidedPredictor(student, text, teacher.empty, sampler)
    with torch.no_grad():
        for level in (0.3, 0.5):
            predict(x0, torch.full((4,), level))
    assert asked == [(4, [1.0] * 4), (4, [2.5] * 4)]


def test_every_scale_of_the_range_is_taught_with_its_own_guided_prediction():
    teacher, text, x0, noise = setting()
    lessons = Lessons(DistillSettings(kind="guidance", guidance_range=(1.0, 5.0)), teacher)
    u = torch.rand(4, generator=torch.Generator().manual_seed(0))
    example = lessons.example(x0, noise, u, text, no_student)
    assert example.guidance is not None
    for place, scale in enumerate(example.guidance.tolist()):
        assert 1 <= scale < 5
        alone = Teacher(
            teacher.model, teacher.objective, teacher.empty, SamplerSettings(guidance_scale=scale)
        )
        expected = alone(example.x_t, example.t, text)
        torch.testing.assert_close(example.target[place], expected[place], rtol=1e-4, atol=1e-5)
    many = lessons._scale(torch.rand(4000, generator=torch.Generator().manual_seed(1)))
    assert many is not None
    quarters = torch.histc(many, 4, 1, 5) / 4000
    assert float((quarters - 0.25).abs().max()) < 0.03


def test_a_teacher_that_takes_the_scale_teaches_students_that_do():
    first, text, x0, noise = setting()
    network = with_input(first)
    with torch.no_grad():
        network.transformer.guidance_embedder.contract.weight.normal_(std=0.1)
    teacher = Teacher(network, first.objective, first.empty, first.sampler)
    u = torch.tensor([0.1, 0.3, 0.6, 0.9])
    example = Lessons(
        DistillSettings(kind="progressive", sampler_steps=4, teacher_steps=4), teacher
    ).example(x0, noise, u, text, no_student)
    assert example.guidance is not None
    assert example.guidance.tolist() == [2.5] * 4
    told = network(example.x_t, example.t, text, guidance=example.guidance)
    # one step of one: itself
    torch.testing.assert_close(example.target, told, rtol=1e-3, atol=1e-4)
