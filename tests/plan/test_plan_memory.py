"""The plan's memory per worker against the tensors that real engines keep, for every ZeRO stage."""

import pytest

from lidit.plan import buffer_bytes, state_bytes
from tests.helpers.engine_process import launch

MODEL = {"width": 128, "depth": 3, "heads": 4, "refiner": {"depth": 2}}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    jobs = [
        {"name": f"{precision}-{n}", "engine": {"zero_stage": n, "precision": precision},
         "model": MODEL, "steps": 2,
         "measure": True}
        for n in range(4) for precision in ("float32", "bfloat16")
    ]  # fmt: skip
    return launch(tmp_path_factory.mktemp("memory"), 2, jobs)


@pytest.mark.slow  # half a minute for what test_plan.py checks by arithmetic
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_states_are_what_an_engine_keeps(measured: dict, stage: int, precision: str) -> None:
    found = measured[f"{precision}-{stage}"]
    count = found["parameters"]
    expected = state_bytes(count, stage, 2, precision) + buffer_bytes(count, stage, precision)
    assert expected == pytest.approx(found["held"], rel=0.15)
