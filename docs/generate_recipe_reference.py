"""Write docs/recipe-reference.md, every key of a recipe, from the settings' own
types: `make api`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from lidit.config import EncoderSettings, Recipe
from lidit.config.codec import CodecRecipe
from lidit.config.settings import Settings

PAGE = Path(__file__).with_name("recipe-reference.md")
INTRODUCTION = """# Recipe reference

Every key of a training recipe, an encoder file and a codec recipe, with its type, default and meaning. A key's path
is what the command line takes: `train.steps=200`, `encoders.0.layer=-2`. `lidit recipes show NAME` prints a recipe with
all of its defaults, `lidit recipes validate FILE` finds mistakes, `lidit recipes schema` gives editors a JSON schema.
`make api` writes this page from the settings' types."""  # noqa: E501
KINDS: dict[str, tuple[type[Settings], str]] = {
    "A training recipe": (Recipe, ""),
    "An encoder file, or an entry of `encoders`": (EncoderSettings, "encoders.N."),
    "A codec recipe": (CodecRecipe, ""),
}
BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}


def generate() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    told: set[type[Settings]] = {EncoderSettings}  # it has a part of its own
    for title, (kind, prefix) in KINDS.items():
        parts += [f"## {title}", *tables(kind, prefix, told)]
    return "\n\n".join(parts) + "\n"


def tables(kind: type[Settings], prefix: str, told: set[type[Settings]]) -> Iterator[str]:
    """A table of the kind's own keys, then one per section that no table before holds."""
    sections: list[tuple[str, type[Settings]]] = []
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            sections.append((f"{prefix}{name}.", inner))
        lines.append(row(f"{prefix}{name}", field, inner))
    yield "\n".join(lines)
    for path, inner in sections:
        if inner in told:
            continue
        told.add(inner)
        about = inspect.getdoc(inner) or ""
        yield f"### `{path.rstrip('.')}`"
        if about and about != inspect.getdoc(Settings):
            yield about
        yield from tables(inner, path, told)


def section_of(annotation: Any) -> type[Settings] | None:
    """The settings class behind a field, also in a list, a mapping or an optional one."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next(
        (found for each in get_args(annotation) if (found := section_of(each)) is not None), None
    )


def row(path: str, field: FieldInfo, inner: type[Settings] | None) -> str:
    if field.is_required():
        default = "required"
    elif inner is not None and get_origin(field.annotation) is None:
        default = ""
    else:
        default = f"`{shown(field.get_default(call_default_factory=True))}`"
    told = [field.description or "", *limits(field)]
    return (
        f"| `{path}` | {type_of(field.annotation)} | {default} | "
        f"{cell(', '.join(filter(None, told)))} |"
    )


def limits(field: FieldInfo) -> Iterator[str]:
    """What the type's constraints say, in words."""
    for rule in field.metadata:
        for kind, (attribute, words) in BOUNDS.items():
            if isinstance(rule, kind):
                yield f"{words} {getattr(rule, attribute):g}"
        if isinstance(rule, MinLen):
            yield "not empty" if rule.min_length == 1 else f"at least {rule.min_length} long"
        if isinstance(rule, MaxLen):
            yield f"at most {rule.max_length} long"


def type_of(annotation: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(inside[0])
    if origin is Literal:
        return ", ".join(f"`{shown(value)}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(
            dict.fromkeys("none" if each is NoneType else type_of(each) for each in inside)
        )
    if origin in (tuple, list):
        if Ellipsis in inside or origin is list:
            return f"list of {type_of(inside[0])}"
        return f"list of {len(inside)}: {', '.join(type_of(each) for each in inside)}"
    if origin is dict:
        return f"mapping to {type_of(inside[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def shown(value: Any) -> str:
    """A default as YAML would hold it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return cell(str(value)) or '""'


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    PAGE.write_text(generate(), encoding="utf-8")
