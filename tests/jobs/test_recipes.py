"""`lidit recipes`: what it shows is what a command would use."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from jobs.recipe import app, load
from lidit.config.shipped import ENCODERS, RECIPES, SETTINGS, load_recipe
from lidit.errors import InputError


def test_every_shipped_file_is_listed_and_has_no_mistake() -> None:
    rows = json.loads(CliRunner().invoke(app, ["list", "--json"]).output)
    names = [path.stem for folder in (RECIPES, ENCODERS) for path in sorted(folder.glob("*.yaml"))]
    assert [row["name"] for row in rows] == names
    assert {row["kind"] for row in rows} == set(SETTINGS)
    assert all(row["about"] for row in rows)
    told = CliRunner().invoke(app, ["validate", *names]).output.splitlines()
    assert told == [f"{row['name']}: {row['kind']}, no mistake" for row in rows]


def test_what_is_shown_can_be_used(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["show", "demo", "train.steps=7"]).output
    assert load_recipe("demo", ["train.steps=7"]).train.steps == 7
    (tmp_path / "mine.yaml").write_text(shown)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("demo", ["train.steps=7"])
    as_json = CliRunner().invoke(app, ["show", "demo", "train.steps=7", "--json"]).output
    assert json.loads(as_json) == yaml.safe_load(shown)


def test_a_mistake_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ncorpus: c\nencoders: [smollm2]\ntrain: {stepz: 5}\n")
    with pytest.raises(InputError, match=r"stepz.*steps"):
        load(str(path))
    with pytest.raises(InputError, match="no such recipe or encoder file"):
        load("missing.yaml")
    with pytest.raises(InputError, match=r"one of .*demo.*lidit recipes list"):
        load("dem0")


def test_a_schema_takes_what_ships() -> None:
    schema = json.loads(CliRunner().invoke(app, ["schema", "encoder"]).output)
    shipped = yaml.safe_load((ENCODERS / "smollm2.yaml").read_text())
    assert shipped.keys() <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
    assert isinstance(CliRunner().invoke(app, ["schema", "nothing"]).exception, InputError)


def test_a_recipe_remembers_how_it_was_written() -> None:
    recipe = load_recipe("demo", ["train.steps=7"])
    assert recipe.written.startswith("# The demo")
    assert recipe.written.endswith("# changed on the command line:\n# train.steps=7\n")
    assert recipe.placed("/elsewhere", "/corpus").written == recipe.written
