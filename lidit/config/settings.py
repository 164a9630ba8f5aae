"""Settings from files and command-line words: read, overridden, checked; a mistake becomes one line
that helps.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from lidit.config.exact import exact
from lidit.config.passwords import has_password
from lidit.config.yaml_values import MAX_CHARACTERS, YamlError, read_yaml
from lidit.errors import InputError, one_line

PASSWORD = (
    "a URL with a password in it would be written into logs and run records; give it by the "
    "environment instead"
)
MISTAKES_TOLD = 10
SHOWN_CHARACTERS = 120
Kind = TypeVar("Kind", bound="Settings")


class Settings(BaseModel):
    # Settings are logged, tracked and shown; an error must not repeat what may be a password.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of the fields, exact about booleans: pydantic would read true as 1, and 1 or
        "yes" as true.
        """
        schema: CoreSchema = exact(handler(source))
        return schema

    @model_validator(mode="before")
    @classmethod
    def _no_passwords(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            # a section looks for itself, and names the key
            inside = _section_at(cls, (key,)) is not cls
            if any(map(has_password, _texts(value, not inside))):
                raise PydanticCustomError("password", "{where}", {"where": f"{key}: {PASSWORD}"})
        return values


def _texts(value: Any, into_mappings: bool = True) -> Iterator[str]:
    """Every text in a value, at any depth of lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry, into_mappings)
    elif isinstance(value, dict) and into_mappings:
        for entry in value.values():
            yield from _texts(entry)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError where there is none."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CHARACTERS + 1)
        if len(content) > MAX_CHARACTERS:
            raise InputError(
                f"{path}: larger than {MAX_CHARACTERS:,} bytes: not a file of settings"
            )
        tree = read_yaml(content.decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe file") from None
    except YamlError as error:
        raise InputError(f"{path}:{error.line}: not a readable YAML file: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable YAML file: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`key.path=value` words put into a settings tree; values are read as those of a file are."""
    for word in overrides:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise InputError(
                f"{_shown(word)}: an override is key.path=value, such as train.steps=200"
            )
        try:
            value = read_yaml(text) if text else ""
        except YamlError as error:
            raise InputError(f"{_shown(word)}: the value is not valid YAML: {error}") from None
        _put(tree, path.split("."), value, _shown(word))
    return tree


def _shown(value: Any) -> str:
    """A value as a message shows it: its beginning, and never a password."""
    if any(map(has_password, _texts(value))):
        return (
            f"{value.partition('=')[0]}=..."
            if isinstance(value, str) and "=" in value
            else "a URL with a password"
        )
    shower = reprlib.Repr()
    shower.maxstring = shower.maxother = shower.maxlong = SHOWN_CHARACTERS
    return shower.repr(value)


def _put(node: Any, keys: list[str], value: Any, word: str) -> None:
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            # may hold dots: no keys
            names = [str(e.get("name", "")) if isinstance(e, dict) else "" for e in node]
            listed = ", ".join(f"{i} is {name}" for i, name in enumerate(names) if name)
            hint = f"; {listed}" if listed else ""
            raise InputError(f"{word}: {key!r} is not an index of a list of {len(node)}{hint}")
        index: Any = int(key)
    elif isinstance(node, dict):
        index = key
        if rest:
            node.setdefault(key, {})
    else:
        raise InputError(f"{word}: the key before {key!r} holds a single value, which has no keys")
    if rest:
        _put(node[index], rest, value, word)
    else:
        node[index] = value


def validate(kind: type[Kind], tree: dict[str, Any], origin: str) -> Kind:
    """`tree` as settings of `kind`. InputError names the key's path, what was found and what is
    allowed.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise InputError(explain(kind, error, origin)) from None


def explain(kind: type[Settings], error: ValidationError, origin: str) -> str:
    """One line per mistake: file, key path, reason, remedy."""
    lines = []
    mistakes = error.errors(include_url=False)
    inner = {item["loc"][:depth] for item in mistakes for depth in range(len(item["loc"]))}
    # a list is not "too short" by a bad entry
    told = [item for item in mistakes if item["loc"] not in inner]
    for item in told[:MISTAKES_TOLD]:
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            allowed = list(_section_at(kind, item["loc"][:-1]).model_fields)
            close = difflib.get_close_matches(str(item["loc"][-1]), allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            message = f"unknown key; {hint}allowed: {', '.join(allowed)}"
        elif item["type"] not in ("missing", "password") and path:
            expected = _expected(kind, item["loc"], item["type"], item["input"]) or message
            message = f"{expected}, found {_shown(item['input'])}"
        # its message begins with the rest of the path
        separator = "." if item["type"] == "password" else ": "
        lines.append(f"{origin}: {path + separator if path else ''}{message}")
    if len(told) > MISTAKES_TOLD:
        lines.append(f"{origin}: and {len(told) - MISTAKES_TOLD:,} mistakes more")
    return "\n".join(lines)


def _expected(
    kind: type[Settings], location: tuple[int | str, ...], mistake: str, found: Any
) -> str | None:
    """What a list or a section looks like on the command line; pydantic calls them tuples, models
    and dictionaries.
    """
    path = ".".join(map(str, location))
    if mistake == "bool_type":
        return "must be true or false"
    if mistake == "string_type" and isinstance(found, bool | int | float):
        return f'must be text: in quotes, such as {path}: "{found}"'
    if mistake in ("model_type", "dict_type"):
        return f"must be a section: {path}.KEY=VALUE"
    if mistake not in ("tuple_type", "list_type"):
        return None
    if isinstance(found, dict) or found is None:
        return "must be a list"
    field = _section_at(kind, location[:-1]).model_fields.get(str(location[-1]))
    annotation = field.annotation if field else None
    shapes = [
        get_args(shape)
        for shape in (annotation, *get_args(annotation))
        if get_origin(shape) is tuple
    ]
    count = len(shapes[0]) if shapes and Ellipsis not in shapes[0] else 1
    return f"must be a list, such as {path}=[{', '.join([str(found)] * count)}]"


def _section_at(kind: type[Settings], location: tuple[int | str, ...]) -> type[Settings]:
    """The settings class at a path of keys; indices of lists and keys of free mappings have none of
    their own.
    """
    for part in location:
        if part not in kind.model_fields:
            continue
        annotation = kind.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        kind = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, Settings)), kind
        )
    return kind


def flatten(settings: BaseModel, given_only: bool = False) -> dict[str, str]:
    """Dotted key -> text, as experiment trackers want parameters; given_only: without those at
    their defaults.
    """

    def walk(prefix: str, value: Any) -> dict[str, str]:
        if isinstance(value, dict) and value:
            return {
                k: v
                for key, child in value.items()
                for k, v in walk(f"{prefix}{key}.", child).items()
            }
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return walk(prefix, {child.get("name", i): child for i, child in enumerate(value)})
        return {prefix[:-1]: str(value)}

    return walk("", settings.model_dump(mode="json", exclude_defaults=given_only))
