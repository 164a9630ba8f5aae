"""ZeRO 0 to 3 are one computation; checkpoints move between stages and worker counts. Real processes, real gloo."""

import math
from pathlib import Path

import pytest
import torch

from lidit.config import Recipe
from lidit.data.order import shares
from pipelines.training.engine import micro_steps
from tests.helpers.engine_process import launch

STEPS, SAVED = 14, 9


def tensors(folder: Path, job: str) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(folder / f"{job}.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict:
    """All jobs of this file: three process groups, started once."""
    stage = lambda n, **more: {"zero_stage": n, **more}  # noqa: E731
    two = [{"name": "accumulated", "engine": stage(2, accumulation=3), "steps": STEPS}]
    two += [{"name": "poisoned", "engine": stage(2), "steps": 6, "poison": 1, "save": "poisoned", "save_at": 3}]
    two += [{"name": "poisoned-again", "engine": stage(2), "steps": 6, "restore": "poisoned"}]
    two += [{"name": "without", "engine": stage(2), "steps": 6, "leave_out": 1}]
    for n in (0, 2):
        two += [{"name": f"overflow-{n}", "engine": stage(n), "steps": 4, "overflow": 1}]
        two[-1] |= {"save": f"overflow-{n}", "save_at": 3}
        two += [{"name": f"overflow-{n}-again", "engine": stage(n), "steps": 4, "restore": f"overflow-{n}"}]
    two += [{"name": "poisoned-first", "engine": stage(2), "steps": 3, "poison": 0, "poisoned_row": -1}]
    two[-1] |= {"save": "poisoned-first", "save_at": 1}
    two += [{"name": "poisoned-first-again", "engine": stage(2), "steps": 3, "restore": "poisoned-first"}]
    two += [{"name": f"bf16-{n}", "engine": stage(n, precision="bfloat16"), "steps": 12} for n in range(3)]
    for n in range(4):  # stage 3 last: DeepSpeed then replaces torch's linear for the whole process
        two += [{"name": f"two-{n}", "engine": stage(n), "steps": STEPS, "save": f"two-{n}", "save_at": SAVED}]
        two += [{"name": f"average-{n}", "engine": stage(n), "steps": 6, "watch_average": True}]
        two += [{"name": f"again-{n}", "engine": stage(n), "steps": STEPS, "restore": f"two-{n}"}]
    two += [{"name": "overflow-3", "engine": stage(3), "steps": 4, "overflow": 1}]
    two += [{"name": "bf16-3", "engine": stage(3, precision="bfloat16"), "steps": 12}]
    two += [{"name": "three-to-one", "engine": stage(1), "steps": STEPS, "restore": "two-3"}]
    found = launch(folder, 2, two)
    one = [{"name": "one", "engine": stage(0), "steps": STEPS, "save": "one", "save_at": SAVED}]
    one += [{"name": f"two-to-one-{n}", "engine": stage(n), "steps": STEPS, "restore": f"two-{n}"} for n in (1, 2, 3)]
    one += [{"name": "sixteen", "engine": stage(0), "steps": 8, "batch": 16}]
    found |= launch(folder, 1, one)
    three = [{"name": f"to-three-{n}", "engine": stage(n), "steps": STEPS, "restore": f"two-{n}"} for n in (1, 2, 3)]
    three += [{"name": "one-to-three", "engine": stage(3), "steps": STEPS, "restore": "one"}]
    # Four workers wanted, three there: shares of 5, 5 and 6 in two parts, none larger than the four would have had.
    three += [{"name": f"uneven-{n}", "engine": stage(n, workers=4), "steps": 8, "batch": 16} for n in (2, 3)]
    return found | launch(folder, 3, three)


def close(found: list[float], expected: list[float], relative: float) -> None:
    assert found == pytest.approx(expected, rel=relative)


@pytest.mark.parametrize("job", ["two-0", "two-1", "two-2", "two-3", "accumulated"])
def test_every_stage_and_split_gives_the_same_curve(results: dict, job: str) -> None:
    close(results[job]["losses"], results["one"]["losses"], 1e-5)
    close(results[job]["norms"], results["one"]["norms"], 1e-3)
    assert min(results[job]["norms"]) > 0


@pytest.mark.parametrize("stage", range(4))
def test_resume_is_bit_identical(results: dict, folder: Path, stage: int) -> None:
    assert results[f"again-{stage}"]["losses"] == results[f"two-{stage}"]["losses"][SAVED:]
    straight, resumed = tensors(folder, f"two-{stage}"), tensors(folder, f"again-{stage}")
    for part in ("weights", "ema"):
        for name, value in straight[part].items():
            assert torch.equal(value, resumed[part][name]), f"{part} {name}"


@pytest.mark.parametrize(
    "job",
    ["two-to-one-1", "two-to-one-2", "two-to-one-3", "to-three-1", "to-three-2", "to-three-3", "one-to-three",
     "three-to-one"],
)  # fmt: skip
def test_another_number_of_workers_goes_on_with_the_same_curve(results: dict, job: str) -> None:
    close(results[job]["losses"], results["one"]["losses"][SAVED:], 1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_fewer_workers_than_the_recipe_has_share_the_batch_unevenly(results: dict, stage: int) -> None:
    close(results[f"uneven-{stage}"]["losses"], results["sixteen"]["losses"], 1e-5)
    close(results[f"uneven-{stage}"]["norms"], results["sixteen"]["norms"], 1e-3)


@pytest.mark.parametrize(
    ("world_size", "parts"), [(8, 2), (7, 3), (4, 4), (3, 6), (1, 16)]
)  # 128 samples, 8 workers with two parts of 8
def test_no_part_grows_when_workers_are_missing(world_size: int, parts: int) -> None:
    engine = {"workers": 8, "accumulation": 2, "min_workers": 1}
    encoders = [{"name": "a", "model": "none"}]
    recipe = Recipe.model_validate(
        {"name": "r", "corpus": "c", "encoders": encoders, "model": {"fusion": {"mode": "none"}}, "engine": engine}
        | {"train": {"batch_size": 128}}
    )
    assert micro_steps(recipe, world_size) == parts
    largest = max(
        cut.stop - cut.start for share in shares(128, world_size) for cut in shares(share.stop - share.start, parts)
    )
    assert largest <= 8


@pytest.mark.parametrize("stage", range(4))
def test_the_sharded_average_is_the_plain_one(folder: Path, results: dict, stage: int) -> None:
    saved = tensors(folder, f"average-{stage}")
    assert saved["plain"].keys() == saved["ema"].keys()
    for name, value in saved["plain"].items():
        torch.testing.assert_close(saved["ema"][name], value, rtol=1e-5, atol=1e-7, msg=name)
    moved = [name for name, value in saved["ema"].items() if not torch.equal(value, saved["weights"][name])]
    assert len(moved) > len(saved["ema"]) / 2, "the average is just the weights"


def test_a_loss_that_is_not_finite_changes_nothing(results: dict, folder: Path) -> None:
    poisoned, without = results["poisoned"], results["without"]
    assert poisoned["finite"] == [True, False, True, True, True, True]
    assert math.isnan(poisoned["losses"][1])
    assert [loss for loss, taken in zip(poisoned["losses"], poisoned["finite"]) if taken] == without["losses"]
    assert results["poisoned-again"]["losses"] == poisoned["losses"][3:]
    for name, value in tensors(folder, "without")["weights"].items():
        for job in ("poisoned", "poisoned-again"):
            assert torch.equal(tensors(folder, job)["weights"][name], value), (job, name)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(results: dict, folder: Path, stage: int) -> None:
    overflow, without = results[f"overflow-{stage}"], results["without"]
    assert overflow["finite"] == [True, False, True, True]
    assert overflow["norms"][1] == math.inf
    assert all(map(math.isfinite, overflow["losses"]))
    close([loss for loss, taken in zip(overflow["losses"], overflow["finite"]) if taken], without["losses"][:3], 1e-5)
    if stage != 3:  # the average has taken as many steps as Adam has
        assert results[f"overflow-{stage}-again"]["losses"] == overflow["losses"][3:]


def test_a_checkpoint_before_any_step_was_taken_goes_on_too(results: dict) -> None:
    first = results["poisoned-first"]
    assert first["finite"] == [False, True, True]
    assert math.isfinite(first["losses"][0]), "this worker's part was sound"
    assert results["poisoned-first-again"]["losses"] == first["losses"][1:]


@pytest.mark.parametrize("stage", range(4))
def test_bfloat16_follows_float32(results: dict, stage: int) -> None:
    close(results[f"bf16-{stage}"]["losses"], results["one"]["losses"][:12], 0.03)
