"""Settings: what is wrong, where, and what is allowed, before anything starts."""

from pathlib import Path

import pytest

from jobs.support.options import node_labels
from lidit.config import EncoderSettings, Recipe
from lidit.config.settings import apply_overrides, flatten, load_yaml, validate
from lidit.config.shipped import (
    ENCODERS,
    RECIPES,
    find,
    load_ablation,
    load_encoder_settings,
    load_recipe,
)
from lidit.errors import InputError

RECIPE = """
name: r
corpus: c
encoders: [smollm2, {name: other, model: here}]
train: {steps: 5, optimizer: {lr: 1e-3}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.step=3", ["train.step", "unknown key", "did you mean 'steps'", "batch_size"]),
        ("train.steps=0", ["train.steps", "greater than or equal to 1", "found 0"]),
        ("train.steps=many", ["train.steps", "valid integer", "'many'"]),
        ("engine.zero_stage=7", ["engine.zero_stage", "0, 1, 2 or 3", "found 7"]),
        ("encoders.1.lyer=2", ["encoders.1.lyer", "did you mean 'layer'"]),
        ("encoders.7.layer=2", ["'7' is not an index of a list of 2"]),
        ("encoders.other.layer=2", ["not an index of a list of 2; 0 is smollm2, 1 is other"]),
        (
            "encoders=smollm2",
            ["encoders: must be a list, such as encoders=[smollm2], found 'smollm2'"],
        ),
        ("train.optimizer.betas=[0.9]", ["train.optimizer.betas"]),
        ("train.optimizer.betas=0.9", ["must be a list, such as train.optimizer.betas=[0.9, 0.9]"]),
        ("plan.latent=8", ["must be a list, such as plan.latent=[8, 8, 8]"]),
        ("train=5", ["train: must be a section: train.KEY=VALUE, found 5"]),
        ("engine.label_selector=x", ["must be a section: engine.label_selector.KEY=VALUE"]),
        ("pools={other: {actrs: 2}}", ["pools.other.actrs", "did you mean 'actors'"]),
        ("model.fusion.mode=none", ["exactly one encoder", "smollm2"]),
        ("train.batch_size=31", ["train.batch_size", "divisible"]),
        (
            "output=s3://bucket/runs",
            ["output: must be a folder", "mount shared storage", "found 's3://bucket/runs'"],
        ),
        ("output=file:///runs", ["output: must be a folder that every node sees, not a URL"]),
        ("encoders.1.name=smollm2", ["names must differ"]),
        ("train.steps.deeper=1", ["train.steps.deeper", "single value"]),
        ("train", ["key.path=value"]),
        ("train.steps=[1", ["not valid YAML"]),
    ],
)
def test_a_mistake_gives_one_clear_error(
    recipe_file: Path, override: str, expected: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(str(recipe_file), ["engine.workers=2", override])
    assert all(part in str(caught.value) for part in expected), caught.value
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.non_finite=skip", "engine.accumulation=2"],
            "train.non_finite: 'skip' needs whole batches",
        ),
        (
            ["train.non_finite=skip", "engine.workers=2", "engine.min_workers=1"],
            "'skip' needs whole batches",
        ),
        (["train.keep_best=true"], "train.keep_best: .* set train.validate_every"),
        (
            ["online={}", "pool.distinct=true"],
            "pool.distinct: with online each unit is computed alone",
        ),
        (["train.validate_every=5"], "nothing is held out; set data.validation_fraction"),
        (
            ["engine.gpus_per_worker=2"],
            "gpus_per_worker: 2 is no number of GPUs that a worker can use; give 0 or 1",
        ),
        (
            ["engine.workers=2", "engine.gpus_per_worker=0.5"],
            "gpus_per_worker: 0.5 is no number of GPUs",
        ),
    ],
)
def test_settings_that_would_do_nothing_or_harm_together(
    recipe_file: Path, overrides: list[str], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        load_recipe(str(recipe_file), overrides)


def test_local_folders_become_absolute_and_hub_ids_stay(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "low").mkdir()
    recipe = load_recipe(str(recipe_file), ["train.init_from=low", "codec.model=some/hub-id"])
    placed = recipe.placed("/out", "s3://bucket/corpus")
    assert (placed.output, placed.corpus) == ("/out", "s3://bucket/corpus")
    assert placed.train.init_from == str(tmp_path / "low")
    assert placed.codec.model == "some/hub-id"


def test_overrides_reach_lists_and_numbers(recipe_file: Path) -> None:
    recipe = load_recipe(
        str(recipe_file), ["encoders.0.layer=-2", "train.optimizer.lr=2e-4", "codec.model=null"]
    )
    assert recipe.encoders[0].layer == -2
    assert recipe.encoders[0].name == "smollm2"
    assert recipe.train.optimizer.lr == 2e-4
    assert recipe.train.steps == 5


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    for name, content in (
        ("list.yaml", "- 1"),
        ("broken.yaml", "a: [1"),
        ("tag.yaml", "a: !!python/object:os.x {}"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=name):
            load_recipe(str(tmp_path / name))
    with pytest.raises(InputError, match="no such recipe"):
        load_recipe(str(tmp_path / "absent.yaml"))
    with pytest.raises(InputError, match="demo"):
        load_recipe("absent")


def load_codec(name: str) -> Path:
    return find(name, RECIPES, "codec recipe")


def test_a_recipe_of_another_kind_is_told_with_the_command_that_takes_it(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("arms: {}\n")
    for load, name, said in (
        (
            load_recipe,
            "ablate-2cores",
            "ablate-2cores is an ablation recipe: lidit ablate ablate-2cores",
        ),
        (
            load_recipe,
            "codec-small",
            "codec-small is a codec recipe: lidit train-codec codec-small",
        ),
        (load_recipe, str(own), f"{own} is an ablation recipe: lidit ablate {own}"),
        (load_ablation, "demo", "demo is a training recipe: lidit train demo"),
        (load_codec, "demo", "demo is a training recipe: lidit train demo"),
    ):
        with pytest.raises(InputError) as caught:
            load(name)
        assert str(caught.value) == said


def test_an_unknown_name_is_answered_with_the_recipes_that_fit() -> None:
    for load, fitting, other in (
        (load_recipe, "demo", ("ablate-", "codec-")),
        (load_ablation, "ablate-2cores", ("demo", "codec-", "lidit-")),
        (load_codec, "codec-small", ("demo", "ablate-", "lidit-")),
    ):
        with pytest.raises(InputError, match=f"give a YAML file or one of .*{fitting}") as caught:
            load("absent")
        assert not any(name in str(caught.value) for name in other)


def test_node_labels_are_pairs() -> None:
    assert node_labels(["lidit/pool=large", "zone=a=b"]) == {"lidit/pool": "large", "zone": "a=b"}
    assert node_labels(None) == {}
    for word in ("pool", "=x", "pool="):
        with pytest.raises(
            InputError, match=r"--node-label .*: a label is KEY=VALUE, such as " r"lidit/pool=large"
        ):
            node_labels([word])


# not codecs, ablations
TRAININGS = [path for path in sorted(RECIPES.glob("*.yaml")) if "encoders" in load_yaml(path)]


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert load_recipe(path.stem).name


@pytest.mark.parametrize("path", sorted(ENCODERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_encoder_is_valid(path: Path) -> None:
    assert load_encoder_settings(path.stem).name == path.stem.removeprefix("lidit-")


def test_settings_are_frozen_and_flatten_to_parameters(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "x"  # type: ignore[misc]
    flat = flatten(recipe)
    assert flat["train.optimizer.lr"] == "0.001"
    assert flat["encoders.other.model"] == "here"


def test_a_wrong_type_deep_inside_names_its_path() -> None:
    tree = apply_overrides({"name": "e", "model": "m"}, ["max_tokens=-1"])
    with pytest.raises(InputError, match=r"max_tokens: .*greater than or equal to 1, found -1"):
        validate(EncoderSettings, tree, "e.yaml")
    with pytest.raises(InputError, match="corpus: Field required"):
        validate(Recipe, {"name": "r", "encoders": [{"name": "e", "model": "m"}]}, "r.yaml")
