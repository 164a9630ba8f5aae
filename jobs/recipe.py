"""`lidit recipes`: the recipes that ship, and what a recipe file says once it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.support.start import HELP_OPTIONS
from lidit.errors import InputError

if TYPE_CHECKING:
    from lidit.config import EncoderSettings, Recipe
    from lidit.config.settings import Settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", context_settings=HELP_OPTIONS)
KINDS = "recipe, ablation recipe, codec recipe, distillation recipe, alignment recipe, encoder"
File = Annotated[str, typer.Argument(help="Recipe or encoder file, or the name of a shipped one.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON instead.")]


@app.callback()
def recipes() -> None:
    """List, show and check recipes and encoder files.

    **Reads** YAML files. **Writes** nothing; loads no model and starts no cluster.

    **Example:** `lidit recipes show demo train.steps=200`
    """


@app.command("list")
def list_shipped(as_json: AsJson = False) -> None:
    """List what ships: name, kind, and what the file's first sentence says.

    **Example:** `lidit recipes list`
    """
    from lidit.config.shipped import ENCODERS, RECIPES, kind_of

    paths = [*sorted(RECIPES.glob("*.yaml")), *sorted(ENCODERS.glob("*.yaml"))]
    rows = [{"name": path.stem, "kind": kind_of(path), "about": _about(path)} for path in paths]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    wide = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:{wide}}  {row['kind']:19}  {row['about']}")


@app.command("show", context_settings=HELP_OPTIONS)
def show(
    file: File,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: train.steps=200")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a recipe as a command would use it: every setting, defaults included, changes put over
    it.

    **Example:** `lidit recipes show demo train.steps=200`
    """
    import yaml

    tree = load(file, overrides)[1].model_dump(mode="json")
    print(
        json.dumps(tree, indent=1) if as_json else yaml.safe_dump(tree, sort_keys=False, width=100),
        end="",
    )
    if as_json:
        print()


@app.command("validate")
def validate(files: Annotated[list[str], typer.Argument(help="Recipe or encoder files.")]) -> None:
    """Check files as the commands that take them do. Exit code 2 at the first mistake, which is
    named.

    **Example:** `lidit recipes validate mine.yaml`
    """
    for file in files:
        print(f"{file}: {load(file)[0]}, no mistake")


@app.command("schema")
def schema(kind: Annotated[str, typer.Argument(help=f"One of: {KINDS}.")] = "recipe") -> None:
    """Print the JSON schema of a kind of file, for editors that complete and check YAML.

    **Example:** `lidit recipes schema encoder > encoder.schema.json`
    """
    from lidit.config.shipped import SETTINGS

    if kind not in SETTINGS:
        raise InputError(f"{kind!r}: no kind of file; give one of {KINDS}")
    print(json.dumps(SETTINGS[kind].model_json_schema(), indent=1))


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """A run's recipe, a file or the name of a shipped one, with overrides as on a command line."""
    from lidit.config import shipped

    return shipped.load_recipe(name, overrides)


def load_encoder(name: str, overrides: list[str] | None = None) -> EncoderSettings:
    """An encoder's settings, a file or the name of shipped ones, with overrides as on a command
    line.
    """
    from lidit.config import shipped

    return shipped.load_encoder_settings(name, overrides)


def load(name: str, overrides: list[str] | None = None) -> tuple[str, Settings]:
    """A file of any kind: the kind, one of `SETTINGS`, and what the file says with overrides."""
    from lidit.config.shipped import (
        ENCODERS,
        RECIPES,
        find,
        kind_of,
        load_ablation,
        load_alignment,
        load_codec_recipe,
        load_distillation,
    )

    loaders: dict[str, Callable[[str, list[str] | None], Settings]] = {
        "recipe": load_recipe,
        "ablation recipe": load_ablation,
        "codec recipe": load_codec_recipe,
        "distillation recipe": load_distillation,
        "alignment recipe": load_alignment,
        "encoder": load_encoder,
    }
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    encoder = (
        not is_path
        and not (RECIPES / f"{name}.yaml").is_file()
        and (ENCODERS / f"{name}.yaml").is_file()
    )
    kind = "encoder" if encoder else kind_of(find(name, RECIPES, "recipe or encoder"))
    return kind, loaders[kind](name, overrides)


def _about(path: Path) -> str:
    """The first sentence of the comment that a file begins with."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    first, _, _ = " ".join(lines).partition(". ")
    return first.rstrip(".")
