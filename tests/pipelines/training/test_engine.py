"""ZeRO 0 to 3 are one computation; checkpoints move between stages and worker counts. Real
processes, real gloo.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch

from lidit.config import Recipe
from lidit.data.order import shares
from lidit.errors import JobError
from pipelines.training.engine import deepspeed_config, micro_steps, require_tools
from tests.helpers.engine_process import launch, recipe_of

STEPS, SAVED, SHORT = 8, 5, 6
# Stage 1 shares stage 2's optimizer and all that is ours around it: its grid is a second opinion.
STAGES = [0, pytest.param(1, marks=pytest.mark.slow), 2, 3]
Job = dict[str, object]
Launched = Callable[[int], dict[str, dict]]


def tensors(results: dict, job: str) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(results["folder"] / f"{job}.pt", weights_only=True)


def stage(number: int, **more: object) -> Job:
    return {"zero_stage": number, **more}


def straight_and_resumed(number: int) -> list[Job]:
    """What every stage is asked for, by two workers."""
    return [
        {
            "name": f"two-{number}",
            "engine": stage(number),
            "steps": STEPS,
            "save": f"two-{number}",
            "save_at": SAVED,
        },
        {
            "name": f"again-{number}",
            "engine": stage(number),
            "steps": STEPS,
            "restore": f"two-{number}",
        },
        {"name": f"average-{number}", "engine": stage(number), "steps": 4, "watch_average": True},
        {"name": f"bf16-{number}", "engine": stage(number, precision="bfloat16"), "steps": STEPS},
    ]


def in_parts(number: int) -> Job:
    """A bfloat16 training whose batches come one sample after the other."""
    engine = stage(number, accumulation=6, precision="bfloat16")
    return {"name": f"bf16-parts-{number}", "engine": engine, "steps": STEPS}


def not_finite() -> list[Job]:
    """Losses and gradients that are not numbers, by two workers; stage 3's is in `results`."""
    jobs: list[Job] = [
        {"name": "poisoned", "engine": stage(2), "steps": SHORT, "poison": 1, "save": "poisoned",
         "save_at": 3},
        {"name": "poisoned-again", "engine": stage(2), "steps": SHORT, "restore": "poisoned"},
        {"name": "without", "engine": stage(2), "steps": SHORT, "leave_out": 1},
        {"name": "poisoned-first", "engine": stage(2), "steps": 3, "poison": 0, "poisoned_row": -1,
         "save": "poisoned-first", "save_at": 1},
        {"name": "poisoned-first-again", "engine": stage(2), "steps": 3,
         "restore": "poisoned-first"},
    ]  # fmt: skip
    for n in (0, 2):
        name = f"overflow-{n}"
        jobs += [
            {
                "name": name,
                "engine": stage(n),
                "steps": 4,
                "overflow": 1,
                "save": name,
                "save_at": 3,
            },
            {"name": f"{name}-again", "engine": stage(n), "steps": 4, "restore": name},
        ]
    return jobs


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The jobs of a stage and of those that share its three process groups, started once."""

    @functools.cache
    def results(several: bool) -> dict[str, dict]:
        folder = tmp_path_factory.mktemp("engine")
        # stage 3 last: DeepSpeed then replaces torch's linear for good
        stages = (0, 2, 3) if several else (1,)
        two = [job for number in stages for job in straight_and_resumed(number)]
        one = [{"name": "one", "engine": stage(0), "steps": STEPS, "save": "one", "save_at": SAVED}]
        three = [
            {"name": f"to-three-{n}", "engine": stage(n), "steps": STEPS, "restore": f"two-{n}"}
            for n in stages
            if n
        ]
        one += [
            {**job, "name": str(job["name"]).replace("to-three", "two-to-one")} for job in three
        ]
        if several:
            two = [
                {"name": "accumulated", "engine": stage(2, accumulation=3), "steps": STEPS},
                in_parts(2),
                *not_finite(),
                *two,
            ]
            two += [
                {"name": "at-once", "engine": stage(2), "steps": 4, "overflow": 1, "at_once": True}
            ]
            two += [
                {"name": "overflow-3", "engine": stage(3), "steps": 4, "overflow": 1},
                in_parts(3),
            ]
            alone = [
                {"name": "large-3", "engine": stage(3), "model": {"width": 192}, "steps": 4,
                 "average_model": True,
                 "numbers_on_rank_zero": True}
            ]  # fmt: skip
            one += [
                {
                    "name": "large",
                    "engine": stage(0),
                    "model": {"width": 192},
                    "steps": 4,
                    "average_model": True,
                }
            ]
            two += [
                {"name": "three-to-one", "engine": stage(1), "steps": STEPS, "restore": "two-3"}
            ]
            one += [{"name": "sixteen", "engine": stage(0), "steps": SHORT, "batch": 16}]
            three += [
                {"name": "one-to-three", "engine": stage(3), "steps": STEPS, "restore": "one"}
            ]
            # Four workers wanted, three there: shares of 5, 5 and 6 in two parts, none larger than
            # the four would have had.
            three += [
                {"name": f"uneven-{n}", "engine": stage(n, workers=4), "steps": SHORT, "batch": 16}
                for n in (2, 3)
            ]
        found = launch(folder, 2, two)
        if several:  # as a training is: no other stage has begun DeepSpeed's communication before
            found |= launch(folder, 2, alone)
        found |= launch(folder, 1, one)
        return found | launch(folder, 3, three) | {"folder": folder}

    return lambda number: results(number != 1)


@pytest.fixture(scope="module")
def results(launched: Launched) -> dict[str, dict]:
    """The jobs of stages 0, 2 and 3."""
    return launched(0)


def close(found: list[float], expected: list[float], relative: float) -> None:
    assert found == pytest.approx(expected, rel=relative)


def same_curve(found: dict, expected: dict) -> None:
    close(found["losses"], expected["losses"], 1e-5)
    close(found["norms"], expected["norms"], 1e-3)
    assert min(found["norms"]) > 0


@pytest.mark.parametrize("number", STAGES)
def test_every_stage_and_split_gives_the_same_curve(launched: Launched, number: int) -> None:
    same_curve(launched(number)[f"two-{number}"], launched(number)["one"])


def test_parts_of_a_batch_give_the_same_curve(results: dict) -> None:
    same_curve(results["accumulated"], results["one"])


@pytest.mark.parametrize("number", STAGES)
def test_resume_is_bit_identical(launched: Launched, number: int) -> None:
    results = launched(number)
    assert results[f"again-{number}"]["losses"] == results[f"two-{number}"]["losses"][SAVED:]
    straight, resumed = tensors(results, f"two-{number}"), tensors(results, f"again-{number}")
    for part in ("weights", "ema"):
        for name, value in straight[part].items():
            assert torch.equal(value, resumed[part][name]), f"{part} {name}"


def test_weights_that_are_cut_into_shares_come_from_rank_zero(results: dict) -> None:
    """ZeRO-3 gathers what is above its threshold for each use; smaller parameters it would keep
    whole.
    """
    assert set(results["large-3"]["kept_whole"]) == {False, True}
    same_curve(results["large-3"], results["large"])


def test_flops_count_captions_and_their_padding_under_every_stage(results: dict) -> None:
    useful, computed = results["large-3"]["flops"]  # of half a batch
    assert 0 < useful < computed
    assert results["large"]["flops"][1] == pytest.approx(2 * computed)


def test_compiling_that_cannot_work_is_refused_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    require_tools(torch.device("cpu"))
    with pytest.raises(JobError, match=r"no C compiler.*engine\.compile=false"):
        require_tools(torch.device("cuda"))


def test_gradients_measured_at_once_are_clipped_and_refused_as_deepspeed_does(
    results: dict,
) -> None:
    found, expected = results["at-once"], results["overflow-2"]
    assert found["finite"] == expected["finite"] == [True, False, True, True]
    close(found["losses"], expected["losses"], 1e-6)
    close(found["norms"], expected["norms"], 1e-5)


@pytest.mark.parametrize("number", STAGES[1:])
def test_another_number_of_workers_goes_on_with_the_same_curve(
    launched: Launched, number: int
) -> None:
    results = launched(number)
    for job in (f"two-to-one-{number}", f"to-three-{number}"):
        close(results[job]["losses"], results["one"]["losses"][SAVED:], 1e-5)


@pytest.mark.parametrize("job", ["one-to-three", "three-to-one"])
def test_another_stage_goes_on_with_the_same_curve(results: dict, job: str) -> None:
    close(results[job]["losses"], results["one"]["losses"][SAVED:], 1e-5)


@pytest.mark.parametrize("number", [2, 3])
def test_fewer_workers_than_the_recipe_has_share_the_batch_unevenly(
    results: dict, number: int
) -> None:
    same_curve(results[f"uneven-{number}"], results["sixteen"])


@pytest.mark.parametrize(
    ("engine", "accumulates", "overlaps"),
    [
        ({"zero_stage": 2, "accumulation": 3}, "fp32", False),
        ({"zero_stage": 3, "accumulation": 3}, "fp32", False),
        ({"zero_stage": 2}, None, False),
        ({"zero_stage": 1, "accumulation": 3}, None, False),
        ({"zero_stage": 2, "gpus_per_worker": 1}, None, True),
        ({"zero_stage": 1, "gpus_per_worker": 1}, None, True),
        ({"zero_stage": 0, "gpus_per_worker": 1}, None, False),
    ],
)
def test_several_parts_are_summed_in_float32_and_sums_overlap_on_gpus(
    engine: dict, accumulates: str | None, overlaps: bool
) -> None:
    recipe = recipe_of({"engine": {"precision": "bfloat16", **engine}}, 2)
    config = deepspeed_config(recipe, 2, 10**9)
    assert config.get("data_types", {}).get("grad_accum_dtype") == accumulates
    assert bool(config["zero_optimization"].get("overlap_comm")) == overlaps
    alone = deepspeed_config(recipe_of({"engine": engine}, 1), 1, 10**9)
    assert "overlap_comm" not in alone["zero_optimization"]


@pytest.mark.parametrize(
    ("world_size", "parts"), [(8, 2), (7, 3), (4, 4), (3, 6), (1, 16)]
)  # 128 samples, 8 workers with two parts of 8
def test_no_part_grows_when_workers_are_missing(world_size: int, parts: int) -> None:
    engine = {"workers": 8, "accumulation": 2, "min_workers": 1}
    encoders = [{"name": "a", "model": "none"}]
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "corpus": "c",
            "encoders": encoders,
            "model": {"fusion": {"mode": "none"}},
            "engine": engine,
        }
        | {"train": {"batch_size": 128}}
    )
    assert micro_steps(recipe, world_size) == parts
    largest = max(
        cut.stop - cut.start
        for share in shares(128, world_size)
        for cut in shares(share.stop - share.start, parts)
    )
    assert largest <= 8


@pytest.mark.parametrize("number", STAGES)
def test_the_sharded_average_is_the_plain_one(launched: Launched, number: int) -> None:
    saved = tensors(launched(number), f"average-{number}")
    assert saved["plain"].keys() == saved["ema"].keys()
    for name, value in saved["plain"].items():
        torch.testing.assert_close(saved["ema"][name], value, rtol=1e-5, atol=1e-7, msg=name)
    moved = [
        name
        for name, value in saved["ema"].items()
        if not torch.equal(value, saved["weights"][name])
    ]
    assert len(moved) > len(saved["ema"]) / 2, "the average is just the weights"


def test_a_loss_that_is_not_finite_changes_nothing(results: dict) -> None:
    poisoned, without = results["poisoned"], results["without"]
    assert poisoned["finite"] == [True, False, True, True, True, True]
    assert math.isnan(poisoned["losses"][1])
    assert [
        loss for loss, taken in zip(poisoned["losses"], poisoned["finite"]) if taken
    ] == without["losses"]
    assert results["poisoned-again"]["losses"] == poisoned["losses"][3:]
    expected = tensors(results, "without")["weights"]
    for job in ("poisoned", "poisoned-again"):
        found = tensors(results, job)["weights"]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (job, name)


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(results: dict, number: int) -> None:
    overflow, without = results[f"overflow-{number}"], results["without"]
    assert overflow["finite"] == [True, False, True, True]
    assert overflow["norms"][1] == math.inf
    assert all(map(math.isfinite, overflow["losses"]))
    close(
        [loss for loss, taken in zip(overflow["losses"], overflow["finite"]) if taken],
        without["losses"][:3],
        1e-5,
    )
    if number != 3:  # the average has taken as many steps as Adam has
        assert results[f"overflow-{number}-again"]["losses"] == overflow["losses"][3:]


def test_a_checkpoint_before_any_step_was_taken_goes_on_too(results: dict) -> None:
    first = results["poisoned-first"]
    assert first["finite"] == [False, True, True]
    assert math.isfinite(first["losses"][0]), "this worker's part was sound"
    assert results["poisoned-first-again"]["losses"] == first["losses"][1:]


@pytest.mark.parametrize("number", [2, 3])
def test_bfloat16_follows_float32_in_parts_as_whole(results: dict, number: int) -> None:
    """Sums of parts lose nothing that whole batches keep."""
    parts = results[f"bf16-parts-{number}"]
    close(parts["losses"], results["one"]["losses"], 0.03)
    close(parts["norms"], results[f"bf16-{number}"]["norms"], 0.02)


@pytest.mark.parametrize("number", STAGES)
def test_bfloat16_follows_float32(launched: Launched, number: int) -> None:
    results = launched(number)
    close(results[f"bf16-{number}"]["losses"], results["one"]["losses"], 0.03)
