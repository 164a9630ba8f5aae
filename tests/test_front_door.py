"""The front door: `import lidit` is light, its names are the ones they stand for, and types are
known.
"""

import ast
import json
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import lidit
from tests.helpers.tiny_models import tiny_llm

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "ray",
    "transformers",
    "diffusers",
    "pydantic",
    "pyarrow",
    "numpy",
    "yaml",
    "mlflow",
    "deepspeed",
}


def loaded_after(*steps: str) -> list[set[str]]:
    """The heavy libraries in memory after each of `steps`, run one after the other in a fresh
    interpreter.
    """
    report = "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    code = "\n".join(["import json, sys", *(f"{step}\n{report}" for step in steps)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return [HEAVY & set(json.loads(line)) for line in done.stdout.splitlines()]


def test_importing_loads_no_library_and_only_training_needs_ray() -> None:
    imported, used, trains = loaded_after(
        "import lidit; dir(lidit); lidit.__version__; lidit.InputError",
        "[getattr(lidit, name) for name in lidit.__all__ if name != 'train']",
        "lidit.train",
    )
    assert imported == set()
    assert "torch" in used
    assert not used & {"ray", "mlflow", "deepspeed"}
    assert "ray" in trains


def test_every_name_is_what_it_stands_for() -> None:
    assert len(lidit.__all__) >= 15
    assert set(lidit._PLACES) | {"__version__"} == set(lidit.__all__) <= set(dir(lidit))
    for name, place in lidit._PLACES.items():
        module, _, attribute = place.partition(":")
        assert getattr(lidit, name) is getattr(import_module(module), attribute)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lidit' has no attribute 'Corpse'"):
        _ = lidit.Corpse


def test_type_checkers_see_the_same_places() -> None:
    """The table serves Python, the imports under TYPE_CHECKING serve type checkers: they must not
    drift apart.
    """
    tree = ast.parse((ROOT / "lidit" / "__init__.py").read_text())
    block = next(
        n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lidit._PLACES


def test_the_wheel_says_that_it_is_typed() -> None:
    assert (ROOT / "lidit" / "py.typed").is_file()
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in setup["package-data"]["lidit"]


def test_the_version_is_the_installed_one_or_says_that_none_is(tmp_path: Path) -> None:
    assert lidit.__version__ == version("lidit-pipeline")
    # Without site-packages no package is installed: only the sources are on the path, away from
    # the metadata that an editable install leaves beside them.
    (tmp_path / "lidit").symlink_to(ROOT / "lidit")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import lidit; print(lidit.__version__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "0+source"


def test_an_encoder_is_loaded_by_file_or_by_settings_and_is_the_same(tmp_path: Path) -> None:
    settings = {"name": "tiny", "model": str(tiny_llm(tmp_path / "llm")), "layer": -2}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings))
    by_file = lidit.load_encoder(file, "cpu")
    by_name = lidit.load_encoder(str(file), "cpu")
    given = lidit.load_encoder(lidit.EncoderSettings.model_validate(settings), "cpu")
    assert by_file.spec == by_name.spec == given.spec
    (states,) = by_file.encode(["a red circle"])
    assert states.states.shape == (len(states.token_ids), 64)
    assert (states.states == given.encode(["a red circle"])[0].states).all()


def test_an_encoder_that_does_not_ship_is_told_with_those_that_do() -> None:
    near = (
        r"'smolm2': no such encoder; give a YAML file or one of smollm2.*, those that lidit "
        r"encoders names"
    )
    with pytest.raises(lidit.InputError, match=near):
        lidit.load_encoder("smolm2")
