"""What an ablation concludes from its results: intervals over seeds, verdicts, and what the page
says.
"""

from pathlib import Path

import pytest
import yaml

from lidit.config.shipped import load_ablation, load_recipe
from lidit.errors import InputError
from lidit.evals.ablation.paper import CLAIMS, PAPER
from lidit.evals.ablation.report import words, write_ablation_report
from lidit.evals.ablation.results import ArmResult, Measured, Point, compare, summaries
from lidit.evals.statistics import Interval

RECIPES = ("ablate-2cores", "ablate-gpu", "ablate-cluster")


def result(
    arm: str, seed: int, accuracies: tuple[float, ...], positions: tuple[float, ...] = (0.9, 0.7)
) -> ArmResult:
    points = tuple(
        Point(
            100 * (i + 1),
            {"binding, long": Measured(value, value / 100, positions)},
            {"0.5": 1 - value, "0.9": 1.0},
        )
        for i, value in enumerate(accuracies)
    )
    return ArmResult("id", arm, seed, 1000, 1.0, ((100, 0.5),), points)


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    one = result("both", 3, (0.5, 0.75))
    one.save(tmp_path / "arm")
    assert ArmResult.load(tmp_path / "arm") == one
    assert ArmResult.load(tmp_path / "absent") is None
    (tmp_path / "arm" / "result.json").write_text("{}")
    with pytest.raises(InputError, match="delete the arm's folder"):
        ArmResult.load(tmp_path / "arm")
    metrics = one.metrics()
    assert metrics[100] == {"loss": 0.5, "accuracy": 0.5, "gap": 0.005, "validation/loss": 0.75,
                            "binding/long/accuracy": 0.5, "binding/long/gap": 0.005,
                            "binding/long/accuracy_position_1": 0.9,
                            "binding/long/accuracy_position_2": 0.7}  # fmt: skip


def test_arms_are_averaged_over_points_and_seeds() -> None:
    arm = summaries([result("refiner", 0, (0.5, 0.7)), result("refiner", 1, (0.6, 1.0))])["refiner"]
    assert arm.learning.value == pytest.approx(0.7)
    assert arm.final.value == pytest.approx(0.85)
    # two seeds .6 and .8: half = t(.975, 1) x .1 = 1.27, more than an accuracy can be off
    assert (arm.learning.low, arm.learning.high) == (0, 1)
    assert [interval.value for interval in arm.by_position] == pytest.approx([0.9, 0.7])
    assert arm.drop.value == pytest.approx(0.2)


def test_verdicts_follow_the_paired_difference() -> None:
    """Seeds differ by far more than arms do: only pairing by seed can tell the arms apart."""
    results = []
    for seed, level in enumerate((0.55, 0.70, 0.85)):
        results += [
            result("baseline", seed, (level,)),
            result("instruction", seed, (level + 0.02 + 0.001 * seed,)),
            result("refiner", seed, (level - 0.02 - 0.001 * seed,)),
            result("own-token", seed, (level - 0.02 + (0.05, -0.05, 0.0)[seed],)),
        ]
    found = {(one.claim.better, one.claim.worse): one for one in compare(results)}
    assert found["instruction", "baseline"].verdict == "holds"
    assert found["refiner", "baseline"].verdict == "does not hold"
    assert found["refiner", "own-token"].verdict == "cannot be told"
    assert found["instruction", "baseline"].learning.value == pytest.approx(0.021)
    assert set(found) == {
        ("instruction", "baseline"),
        ("refiner", "baseline"),
        ("refiner", "own-token"),
    }
    # The made-up losses fall as accuracy rises, averaged over two timesteps.
    assert found["instruction", "baseline"].loss.value == pytest.approx(-0.021 / 2)
    text = words(list(found.values()))
    assert "**Hold**: instruction > baseline (table 2)" in text
    assert "the other way round): refiner > baseline (table 2)" in text
    assert "refiner > own-token (our own arm)" in text


def test_the_control_is_judged_by_what_was_learned_in_the_end() -> None:
    """Seeds that begin to learn at different times differ in `learning` more than they exceed
    chance.
    """
    results = [
        result("control", seed, (0.5, early, 0.99)) for seed, early in enumerate((0.5, 0.5, 0.98))
    ]
    results += [result("control-causal", seed, (0.5, 0.5, 0.5)) for seed in range(3)]
    (one,) = compare(results)
    assert one.learning.low < 0 < one.final.low
    assert one.verdict == "holds"


def test_one_seed_tells_nothing() -> None:
    (one,) = compare([result("instruction", 0, (0.9,)), result("baseline", 0, (0.5,))])
    assert one.verdict == "cannot be told"
    assert "there are two" in words([one])


def test_the_page_puts_our_figures_beside_the_papers(tmp_path: Path) -> None:
    arms, positions = ("baseline", "instruction", "mine"), (0.9, 0.8, 0.7)
    results = [result(arm, seed, (0.98, 0.99), positions) for arm in arms for seed in (0, 1)]
    page = write_ablation_report(tmp_path, results, "T", {"seeds": "0, 1"}, ["both seed 0"])
    text = page.read_text()
    assert "38.72 / 66.15" in text
    assert "48.41 > 38.72 / 73.45 > 66.15" in text
    assert "both seed 0" in text
    assert "above .97" in text
    assert "1 orderings are looked at, each with a 95 % interval" in text
    assert "| mine |" in text
    assert all(
        (tmp_path / name).stat().st_size > 4000 for name in ("learning.png", "positions.png")
    )
    # Two segments make no curve.
    short = write_ablation_report(
        tmp_path / "short", [result("mine", seed, (0.9,)) for seed in (0, 1)], "T", {}
    )
    assert "positions.png" not in short.read_text()
    assert not (tmp_path / "short" / "positions.png").exists()


def test_the_papers_orderings_agree_with_its_figures() -> None:
    for claim in CLAIMS:
        if claim.table not in ("ours", "layers", "storage", "control"):
            assert PAPER[claim.better][0] > PAPER[claim.worse][0], claim
    assert summaries([result("x", 0, (0.5,))])["x"].final == Interval(
        0.5, float("-inf"), float("inf")
    )


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_hold_every_arm_of_the_tables(name: str) -> None:
    ablation = load_ablation(name)
    compared = {
        arm
        for claim in CLAIMS
        for arm in (claim.better, claim.worse)
        if claim.table not in ("layers", "storage", "control")
    }
    assert compared <= set(ablation.arms)
    assert len(ablation.seeds) >= 3
    for arm in ablation.arms:
        recipes = [ablation.arm_recipe(arm, seed) for seed in ablation.seeds]
        assert len({recipe.name for recipe in recipes}) == len(recipes)
        assert recipes[0].train == ablation.recipe.train
    refiner = {arm: ablation.arm_recipe(arm, 0).model.refiner for arm in ablation.arms}
    assert (
        refiner["baseline"].depth,
        refiner["refiner"].depth,
        refiner["refiner-depth-3"].depth,
    ) == (0, 2, 3)
    assert refiner["causal-refiner"].causal
    assert not refiner["own-token"].mixing
    assert not refiner["refiner-ungated"].gated
    assert ablation.arm_recipe("concatenation", 0).model.fusion.mode == "concatenation"
    assert ablation.arm_recipe("baseline", 0).encoders[0].instruction == ""
    assert ablation.arm_recipe("instruction", 0).encoders[0].instruction is None


def test_the_shipped_control_differs_in_the_refiner_only() -> None:
    ablation = load_ablation("ablate-control")
    assert {arm for c in CLAIMS for arm in (c.better, c.worse) if c.table == "control"} == set(
        ablation.arms
    )
    models = {arm: ablation.arm_recipe(arm, 0).model for arm in ablation.arms}
    for model in models.values():
        assert model.visible_tokens == 5
        assert not model.refiner.gated  # adaptive gates read the mean of the whole caption
    assert [models[arm].refiner.causal for arm in ("control", "control-causal")] == [False, True]
    assert models["control-none"].refiner.depth == 0
    assert {arm.encoders for arm in ablation.arms.values()} == {("smollm2-bare",)}


def test_the_shipped_layers_differ_in_the_states_read_only() -> None:
    ablation = load_ablation("ablate-layers")
    assert {arm for c in CLAIMS for arm in (c.better, c.worse) if c.table == "layers"} == set(
        ablation.arms
    )
    recipes = {arm: ablation.arm_recipe(arm, 0) for arm in ablation.arms}
    assert {arm: recipe.model.layers for arm, recipe in recipes.items()} == {
        "one-layer": "one", "layers-mean": "mean", "layers-learned": "learned",
        "layers-per-block": "per_block",
        "suffix-kept": "one",
    }  # fmt: skip
    assert {
        recipe.encoders[0].suffix for arm, recipe in recipes.items() if arm != "suffix-kept"
    } == {"dropped"}
    assert (
        len({recipe.model.model_copy(update={"layers": "one"}) for recipe in recipes.values()}) == 1
    )
    shared, usual = ablation.recipe, load_ablation("ablate-2cores").recipe
    assert (shared.train, shared.data, shared.objective) == (
        usual.train,
        usual.data,
        usual.objective,
    )


def test_the_shipped_arms_of_stored_states_differ_in_storage_only() -> None:
    ablation = load_ablation("ablate-storage")
    assert {arm for c in CLAIMS for arm in (c.better, c.worse) if c.table == "storage"} == set(
        ablation.arms
    )
    recipes = {arm: ablation.arm_recipe(arm, 0) for arm in ablation.arms}
    stored = {
        arm: {(e.storage, e.storage_error) for e in recipe.encoders}
        for arm, recipe in recipes.items()
    }
    assert stored == {
        "states-exact": {("float32", None)},
        "states-int8": {("int8", None)},
        "states-coded-1": {("coded", 0.1)},
        "states-coded-2": {("coded", 0.2)},
        "states-coded-3": {("coded", 0.3)},
    }
    alike = {
        tuple(
            e.model_copy(update={"name": "", "storage": "int8", "storage_error": None})
            for e in recipe.encoders
        )
        for recipe in recipes.values()
    }
    assert len(alike) == 1
    demo = load_recipe("demo")
    assert (ablation.recipe.model, ablation.recipe.objective, ablation.recipe.data) == (
        demo.model,
        demo.objective,
        demo.data,
    )
    assert ablation.recipe.train.optimizer == demo.train.optimizer


def test_settings_an_arm_would_not_obey_are_refused() -> None:
    load_ablation("ablate-2cores")
    for word in (
        "recipe.train.init_from=runs/base/model",
        "recipe.train.non_finite=skip",
        "recipe.online={ahead: 2}",
    ):
        with pytest.raises(InputError, match=word.partition("=")[0]):
            load_ablation("ablate-2cores", [word])
    load_ablation("ablate-2cores", ["recipe.train.non_finite=skip", "recipe.engine.workers=2"])


def test_impossible_arms_are_refused(tmp_path: Path) -> None:
    tree = {
        "arms": {"a": {"encoders": ["x"]}},
        "recipe": {"name": "r", "corpus": "c", "encoders": [{"name": "one", "model": "m"}]},
    }
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match=r"arms\.a\.encoders.*'x'.*one"):
        load_ablation(str(path))
    with pytest.raises(InputError, match="depht"):
        load_ablation(str(path), ["arms.a.encoders=[one]", "arms.a.model={refiner: {depht: 1}}"])
    with pytest.raises(InputError, match="seed twice"):
        load_ablation(str(path), ["arms.a.encoders=[one]", "seeds=[1, 1]"])
    with pytest.raises(
        InputError,
        match=r"recipe\.ingest\.resolution: 64 differs from scenes\.size 32, " r".*never saw",
    ):
        load_ablation(str(path), ["arms.a.encoders=[one]", "recipe.ingest.resolution=64"])
    load_ablation(str(path), ["arms.a.encoders=[one]", "recipe.ingest.resolution=32"])
