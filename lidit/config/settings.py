"""Settings from files and command-line words: read, overridden, checked; a mistake becomes one line that helps."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lidit.errors import InputError, one_line

URL_WITH_PASSWORD = re.compile(r"://[^/\s:@'\"]*:[^/\s@'\"]+@")
PASSWORD = "a URL with a password in it would be written into logs and run records; give it by the environment instead"
Kind = TypeVar("Kind", bound="Settings")


class Settings(BaseModel):
    # Settings are logged, tracked and shown; an error must not repeat what may be a password.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _no_passwords(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if any(map(has_password, value if isinstance(value, list | tuple) else [value])):
                raise PydanticCustomError("password", "{where}", {"where": f"{key}: {PASSWORD}"})
        return values


def has_password(value: Any) -> bool:
    """Whether a value is a text with a password in a URL."""
    return isinstance(value, str) and bool(URL_WITH_PASSWORD.search(value))


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError where there is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    return content


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`key.path=value` words put into a settings tree; values are read as YAML (`1e-4` counts as a number)."""
    for word in overrides:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise InputError(f"{word!r}: an override is key.path=value, such as train.steps=200")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            raise InputError(f"{word!r}: the value is not valid YAML") from None
        _put(tree, path.split("."), value, word)
    return tree


def _put(node: Any, keys: list[str], value: Any, word: str) -> None:
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not key.isdigit() or int(key) >= len(node):
            names = [str(e.get("name", "")) if isinstance(e, dict) else "" for e in node]  # may hold dots: no keys
            listed = ", ".join(f"{i} is {name}" for i, name in enumerate(names) if name)
            hint = f"; {listed}" if listed else ""
            raise InputError(f"{word!r}: {key!r} is not an index of a list of {len(node)}{hint}")
        index: Any = int(key)
    elif isinstance(node, dict):
        index = key
        if rest:
            node.setdefault(key, {})
    else:
        raise InputError(f"{word!r}: the key before {key!r} holds a single value, which has no keys")
    if rest:
        _put(node[index], rest, value, word)
    else:
        node[index] = value


def validate(kind: type[Kind], tree: dict[str, Any], origin: str) -> Kind:
    """`tree` as settings of `kind`. InputError names the key's path, what was found and what is allowed."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise InputError(explain(kind, error, origin)) from None


def explain(kind: type[Settings], error: ValidationError, origin: str) -> str:
    """One line per mistake: file, key path, reason, remedy."""
    lines = []
    mistakes = error.errors(include_url=False)
    inner = {item["loc"][:depth] for item in mistakes for depth in range(len(item["loc"]))}
    for item in (item for item in mistakes if item["loc"] not in inner):  # a list is not "too short" by a bad entry
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            allowed = list(_section_at(kind, item["loc"][:-1]).model_fields)
            close = difflib.get_close_matches(str(item["loc"][-1]), allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            message = f"unknown key; {hint}allowed: {', '.join(allowed)}"
        elif item["type"] not in ("missing", "password") and path:
            message = f"{_expected(kind, item['loc'], item['type'], item['input']) or message}, found {item['input']!r}"
        separator = "." if item["type"] == "password" else ": "  # its message begins with the rest of the path
        lines.append(f"{origin}: {path + separator if path else ''}{message}")
    return "\n".join(lines)


def _expected(kind: type[Settings], location: tuple[int | str, ...], mistake: str, found: Any) -> str | None:
    """What a list or a section looks like on the command line; pydantic calls them tuples, models and dictionaries."""
    path = ".".join(map(str, location))
    if mistake in ("model_type", "dict_type"):
        return f"must be a section: {path}.KEY=VALUE"
    if mistake not in ("tuple_type", "list_type"):
        return None
    if isinstance(found, dict) or found is None:
        return "must be a list"
    field = _section_at(kind, location[:-1]).model_fields.get(str(location[-1]))
    annotation = field.annotation if field else None
    shapes = [get_args(shape) for shape in (annotation, *get_args(annotation)) if get_origin(shape) is tuple]
    count = len(shapes[0]) if shapes and Ellipsis not in shapes[0] else 1
    return f"must be a list, such as {path}=[{', '.join([str(found)] * count)}]"


def _section_at(kind: type[Settings], location: tuple[int | str, ...]) -> type[Settings]:
    """The settings class at a path of keys; indices of lists and keys of free mappings have none of their own."""
    for part in location:
        if part not in kind.model_fields:
            continue
        annotation = kind.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        kind = next((c for c in candidates if isinstance(c, type) and issubclass(c, Settings)), kind)
    return kind


def flatten(settings: BaseModel) -> dict[str, str]:
    """Dotted key -> text, as experiment trackers want parameters."""

    def walk(prefix: str, value: Any) -> dict[str, str]:
        if isinstance(value, dict) and value:
            return {k: v for key, child in value.items() for k, v in walk(f"{prefix}{key}.", child).items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return walk(prefix, {child.get("name", i): child for i, child in enumerate(value)})
        return {prefix[:-1]: str(value)}

    return walk("", settings.model_dump(mode="json"))
