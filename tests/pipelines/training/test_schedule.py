"""The learning rate of every step: warm-up, then one of three schedules."""

import pytest

from lidit.config import LoopSettings, OptimizerSettings
from pipelines.training.schedule import learning_rate


def rates(schedule: str, warmup: int = 0, steps: int = 100) -> list[float]:
    optimizer = OptimizerSettings(lr=2e-4, schedule=schedule, warmup_steps=warmup)
    settings = LoopSettings(steps=steps, batch_size=4, optimizer=optimizer)
    return [learning_rate(settings, step) for step in range(steps)]


def test_constant_is_the_recipes_rate() -> None:
    assert set(rates("constant")) == {2e-4}


def test_cosine_falls_from_the_full_rate_to_almost_nothing() -> None:
    found = rates("cosine")
    assert found[0] == 2e-4
    assert found[50] == pytest.approx(1e-4)
    assert 0 < found[99] < 1e-7
    assert found == sorted(found, reverse=True)


def test_constant_linear_keeps_the_rate_for_six_tenths_and_ends_near_a_tenth() -> None:
    found = rates("constant_linear")
    assert set(found[:61]) == {2e-4}
    assert found[80] == pytest.approx(2e-4 * 0.55)
    assert found[99] == pytest.approx(2e-4 * 0.1225)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "constant_linear"])
def test_warm_up_rises_in_equal_steps_into_the_schedule(schedule: str) -> None:
    found, without = rates(schedule, warmup=10), rates(schedule)
    assert [a / b for a, b in zip(found, without, strict=True)][:10] == pytest.approx(
        [n / 10 for n in range(1, 11)]
    )
    assert found[9:] == without[9:]
