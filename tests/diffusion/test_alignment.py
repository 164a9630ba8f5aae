"""Losses over pairs of pictures: equal to their formulas in float64, and of the right sign."""

import pytest
import torch

from lidit.config import ObjectiveSettings
from lidit.config.align import AlignSettings
from lidit.diffusion import Objective, build_objective
from lidit.diffusion.alignment import Pairs, difference, distance, dpo, pair_losses

KINDS = ("ddpm", "rectified_flow", "clean")
PAIRS = 3


def made(kind: str, seed: int = 0) -> tuple[Objective, Pairs, torch.Tensor]:
    """An objective, pairs at noise levels from low to high, and a network's prediction."""
    objective = build_objective(ObjectiveSettings(kind=kind))
    generator = torch.Generator().manual_seed(seed)
    x0, drawn, prediction = (torch.randn(2 * PAIRS, 3, 4, 4, generator=generator) for _ in range(3))
    noise = torch.randn(PAIRS, 3, 4, 4, generator=generator).repeat(2, 1, 1, 1)
    t = objective.timesteps(torch.tensor([0.05, 0.4, 0.95]).repeat(2))
    x_t = objective.add_noise(x0, noise, t)
    return objective, Pairs(x0, noise, t, x_t, drawn, torch.tensor([1.0, 0.5, 0.25])), prediction


def truth_and_weight(kind: str, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """What a perfect network predicts and what the loss weighs its square with, in float64, from
    the papers.
    """
    x0, noise, t = pairs.x0.double(), pairs.noise.double(), pairs.t.double().view(-1, 1, 1, 1)
    if kind == "ddpm":
        return noise, torch.ones_like(t)
    if kind == "rectified_flow":
        return noise - x0, torch.ones_like(t)
    return x0, 1 / t.clamp_min(0.1) ** 2


def squares(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight * values**2).flatten(1).mean(1)


@pytest.mark.parametrize("kind", KINDS)
def test_difference_is_the_two_implicit_policies_loss_but_for_what_no_weight_changes(
    kind: str,
) -> None:
    """Published: r |v+ - v|^2 + (1 - r) |v- - v|^2, with the gap as 2 r - 1 and beta as 1 /
    strength.
    """
    objective, pairs, prediction = made(kind)
    truth, weight = truth_and_weight(kind, pairs)
    strength = 2.0

    def published(predicted: torch.Tensor) -> torch.Tensor:
        old, gap = pairs.drawn.double(), torch.cat([pairs.gap, -pairs.gap]).double()
        right, beta = (1 + gap) / 2, 1 / strength
        positive = (1 - beta) * old + beta * predicted
        negative = (1 + beta) * old - beta * predicted
        errors = right * squares(positive - truth, weight) + (1 - right) * squares(
            negative - truth, weight
        )
        better, worse = (errors / beta**2).chunk(2)
        return (better + worse) / 2

    other = made(kind, seed=1)[2]
    found = difference(objective, prediction, pairs, strength) - difference(
        objective, other, pairs, strength
    )
    expected = published(prediction.double()) - published(other.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_worse_picture_is_fled_a_share_as_far_as_the_better_one_is_approached(
    kind: str,
) -> None:
    objective, pairs, _ = made(kind)
    truth, _ = truth_and_weight(kind, pairs)
    strength, away = 0.5, 0.25
    share = torch.cat([pairs.gap, -away * pairs.gap]).double().view(-1, 1, 1, 1)
    reached = (1 - strength * share) * pairs.drawn.double() + strength * share * truth
    settings = AlignSettings(strength=strength, away=away)
    left = pair_losses(settings, objective, reached.float(), pairs)
    torch.testing.assert_close(left, torch.zeros(PAIRS), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_equals_its_formula(kind: str) -> None:
    objective, pairs, prediction = made(kind)
    truth, weight = truth_and_weight(kind, pairs)
    growth = squares(prediction.double() - truth, weight) - squares(
        pairs.drawn.double() - truth, weight
    )
    better, worse = growth.chunk(2)
    expected = torch.log(1 + torch.exp(0.3 * (better - worse)))
    torch.testing.assert_close(
        dpo(objective, prediction, pairs, 0.3).double(), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_distance_equals_its_formula_and_is_nothing_at_the_start(kind: str) -> None:
    objective, pairs, prediction = made(kind)
    _, weight = truth_and_weight(kind, pairs)
    expected = squares(prediction.double() - pairs.drawn.double(), weight)
    found = distance(objective, prediction, pairs.drawn, pairs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert distance(objective, prediction, prediction.clone(), pairs).max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [AlignSettings(kind="difference"), AlignSettings(kind="dpo")])
def test_a_step_goes_towards_the_better_picture_and_away_from_the_worse(
    kind: str, loss: AlignSettings
) -> None:
    objective, pairs, _ = made(kind)
    prediction = pairs.drawn.clone().requires_grad_()
    pair_losses(loss, objective, prediction, pairs).sum().backward()
    assert prediction.grad is not None
    after = pairs.drawn - 1e-3 * prediction.grad
    arguments = pairs.x0, pairs.noise, pairs.t, pairs.x_t
    change = objective.loss(after, *arguments) - objective.loss(pairs.drawn, *arguments)
    better, worse = change.chunk(2)
    assert (better < 0).all()
    assert (worse > 0).all()


@pytest.mark.parametrize("loss", [AlignSettings(kind="difference"), AlignSettings(kind="dpo")])
def test_pairs_of_equal_worth_move_nothing(loss: AlignSettings) -> None:
    objective, pairs, _ = made("clean")
    equal = Pairs(pairs.x0, pairs.noise, pairs.t, pairs.x_t, pairs.drawn, torch.zeros(PAIRS))
    prediction = pairs.drawn.clone().requires_grad_()
    pair_losses(loss, objective, prediction, equal).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.abs().max() < 1e-6
