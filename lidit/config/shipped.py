"""Recipe files: found by path or by the name of one that ships with the package, checked before
anything starts.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from lidit.config.ablation import Ablation
from lidit.config.align import Alignment
from lidit.config.codec import CodecRecipe
from lidit.config.distill import Distillation
from lidit.config.encoder import EncoderSettings
from lidit.config.left_out import LEFT_OUT
from lidit.config.recipe import Recipe
from lidit.config.settings import Settings, apply_overrides, load_yaml, validate
from lidit.errors import InputError

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"  # beside the commands that take them
ENCODERS = RECIPES / "encoders"
LISTED = 16  # names that a message holds
# What a recipe is called -> as others call it, the command that takes it, a section that no other
# kind has.
KINDS = {
    "recipe": ("a training recipe", "train", "encoders"),
    "ablation recipe": ("an ablation recipe", "ablate", "arms"),
    "codec recipe": ("a codec recipe", "train-codec", "loss"),
    "distillation recipe": ("a distillation recipe", "distill", "stages"),
    "alignment recipe": ("an alignment recipe", "align", "reward"),
}
# Of every kind of file that ships.
SETTINGS: dict[str, type[Settings]] = {
    "recipe": Recipe,
    "ablation recipe": Ablation,
    "codec recipe": CodecRecipe,
    "distillation recipe": Distillation,
    "alignment recipe": Alignment,
    "encoder": EncoderSettings,
}


def load_recipe(recipe: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe, check it, and put overrides over it.

    Args:
        recipe: A YAML file with the keys of `Recipe`, or the name of a recipe that ships with the
            package, such as
            `demo`. Its `encoders` may name encoder files: shipped, or relative to the recipe.
        overrides: Changes such as `train.steps=200`, each a key path and a YAML value.

    Returns:
        The recipe. Every key is checked; nothing is opened or fetched.

    Raises:
        InputError: No such recipe, another kind of recipe, or a key or value that is not allowed;
            one line per
            mistake.
    """
    path = find(recipe, RECIPES, "recipe")
    tree = apply_overrides(_with_encoders(load_yaml(path), path), overrides or [])
    return validate(Recipe, _with_encoders(tree, path), str(recipe)).keep_written(
        _written(path, overrides)
    )


def _written(path: Path, overrides: list[str] | None) -> str:
    """The file's text, and the overrides below it."""
    changed = "".join(f"# {word}\n" for word in overrides or [])
    return path.read_text(encoding="utf-8") + (
        f"\n# changed on the command line:\n{changed}" if changed else ""
    )


def load_ablation(recipe: str, overrides: list[str] | None = None) -> Ablation:
    """An ablation recipe with overrides; encoders of its `recipe` section as in `load_recipe`."""
    path = find(recipe, RECIPES, "ablation recipe")
    tree = load_yaml(path)
    if isinstance(tree.get("recipe"), dict):
        tree["recipe"] = _with_encoders(tree["recipe"], path)
    return validate(Ablation, apply_overrides(tree, overrides or []), str(recipe))


def load_encoder_settings(name: str, overrides: list[str] | None = None) -> EncoderSettings:
    """An encoder file by path or shipped name."""
    path = find(name, ENCODERS, "encoder")
    return validate(EncoderSettings, apply_overrides(load_yaml(path), overrides or []), str(name))


def load_codec_recipe(recipe: str, overrides: list[str] | None = None) -> CodecRecipe:
    """A codec recipe by path or shipped name, with overrides."""
    path = find(recipe, RECIPES, "codec recipe")
    tree = apply_overrides(load_yaml(path), overrides or [])
    return validate(CodecRecipe, tree, str(recipe)).keep_written(_written(path, overrides))


def load_distillation(recipe: str, overrides: list[str] | None = None) -> Distillation:
    """A distillation recipe by path or shipped name, with overrides; a stage by its place:
    stages.0.train_steps=200.
    """
    path = find(recipe, RECIPES, "distillation recipe")
    tree = apply_overrides(load_yaml(path), overrides or [])
    return validate(Distillation, tree, str(recipe)).keep_written(_written(path, overrides))


def load_alignment(recipe: str, overrides: list[str] | None = None) -> Alignment:
    """An alignment recipe by path or shipped name, with overrides."""
    path = find(recipe, RECIPES, "alignment recipe")
    tree = apply_overrides(load_yaml(path), overrides or [])
    return validate(Alignment, tree, str(recipe)).keep_written(_written(path, overrides))


def kind_of(path: Path) -> str:
    """The kind of a file, one of `SETTINGS`. An encoder's `model` is a name, a
    recipe's a section.
    """
    tree = load_yaml(path)
    return _kind(path) or ("encoder" if isinstance(tree.get("model"), str) else "recipe")


def find(name: str, shipped: Path, what: str) -> Path:
    """The YAML file meant by a path or a shipped name. InputError where there is none, or a recipe
    of another kind.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise InputError(f"{name}: no such {what} file")
    else:
        path = shipped / f"{name}.yaml"
        if not path.is_file() and what == "encoder" and name in LEFT_OUT:
            raise InputError(
                f"{name}: left out, because {LEFT_OUT[name].reason}; lidit encoders lists "
                "what is there"
            )
        if not path.is_file():
            known = [
                p.stem
                for p in sorted(shipped.glob("*.yaml"))
                if what not in KINDS or _kind(p) in (what, None)
            ]
            if len(known) > LISTED:  # of many the near ones
                known = [
                    *difflib.get_close_matches(name, known, LISTED),
                    f"those that lidit {'encoders' if what == 'encoder' else 'recipes list'} names",
                ]
            raise InputError(
                f"{name!r}: no such {what}; give a YAML file or one of {', '.join(known)}"
            )
    if what in KINDS and (kind := _kind(path)) not in (what, None):
        said, command, _ = KINDS[kind]
        raise InputError(f"{name} is {said}: lidit {command} {name}")
    return path


def _kind(path: Path) -> str | None:
    """The kind of recipe in a file; None where none of the tell-tale sections is there."""
    tree = load_yaml(path)
    return next((kind for kind, (_, _, section) in KINDS.items() if section in tree), None)


def _with_encoders(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """Names in `encoders` become the settings they stand for; relative files are looked up beside
    the recipe.
    """
    entries = tree.get("encoders")
    if not isinstance(entries, list):
        return tree
    full = []
    for entry in entries:
        if isinstance(entry, str):
            beside = path.parent / entry
            full.append(load_yaml(beside if beside.is_file() else find(entry, ENCODERS, "encoder")))
        else:
            full.append(entry)
    return {**tree, "encoders": full}
