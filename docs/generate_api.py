"""Write docs/api.md from the docstrings of what `lidit` exports: `make api`."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import lidit

PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """# Python API

Everything here is an attribute of `lidit`: `import lidit` loads no library, and a name's module is imported when the
name is first used. Only `lidit.train` needs Ray. In shapes, B are samples of a batch, T tokens of a caption, P tokens
of the instruction and W the width of an LLM; latents and images are [C, H, W]. `make api` writes this page from the
docstrings; the scripts in [examples](../examples) use all of it."""  # noqa: E501
GROUPS = {
    "Captions to states": ("load_encoder", "EncoderSettings"),
    "The corpus on disk": ("Corpus", "verify_corpus", "export_corpus"),
    "Batches": ("open_feed", "FeedDataset", "DataSettings"),
    "The model": ("LIDiT", "TextStates", "LIDiTPipeline"),
    "Training": ("load_recipe", "Recipe", "train"),
    "Errors": ("InputError", "JobError", "StorageError"),
}
# What these give back, described below them; a user never imports it.
GIVEN = {
    "Captions to states": ("lidit.text:PromptEncoder", "lidit.text:CaptionStates"),
    "The corpus on disk": (
        "lidit.store:TextFamily",
        "lidit.store:SharedStates",
        "lidit.store:LatentFamily",
    ),
    "Batches": ("lidit.data.feed:Feed", "lidit.data.assembler:TrainingBatch"),
    "The model": ("lidit.pipeline:LIDiTPipelineOutput",),
}
SECTIONS = ("Args:", "Returns:", "Raises:")
LONGEST = 100


def generate() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        for name in names:
            parts += described(f"lidit.{name}", getattr(lidit, name))
        for place in GIVEN.get(title, ()):
            module, _, name = place.partition(":")
            parts += described(name, getattr(import_module(module), name))
    return "\n\n".join(parts) + "\n"


def described(title: str, thing: Any) -> Iterator[str]:
    """Heading, signature and docstring of a function or class, then of the class's
    public methods.
    """
    yield f"### `{title}`"
    if hasattr(thing, "model_fields"):
        yield from docstring(thing)
        yield fields(thing)
        return
    if not inspect.isclass(thing) or made_by_users(thing):
        yield signature(title, thing)
        yield from docstring(thing)
    else:
        yield from itertools.islice(docstring(thing), 1)  # the prose
    if inspect.isclass(thing):
        owner = title.rpartition(".")[2]
        for name, member in members(thing):
            if isinstance(member, property | cached_property):
                yield f"#### `{owner}.{name}`"
                yield from docstring(member)
            else:
                yield f"#### `{owner}.{name}()`"
                yield signature(f"{owner}.{name}", member)
                yield from docstring(member)


def made_by_users(kind: type) -> bool:
    """Whether a class is described with its arguments: errors say one line, and others are made by
    a function.
    """
    return dataclasses.is_dataclass(kind) or kind in (lidit.LIDiT, lidit.FeedDataset)


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that the class or a base class of ours defines, base classes
    first.
    """
    found: dict[str, Any] = {}
    for owner in reversed(kind.__mro__):
        if not owner.__module__.startswith("lidit."):
            continue
        for name, member in vars(owner).items():
            callable_here = inspect.isfunction(member) or isinstance(
                member, classmethod | staticmethod
            )
            public = not name.startswith("_") or name == "__call__"
            if public and (callable_here or isinstance(member, property | cached_property)):
                found[name] = (
                    member
                    if isinstance(member, property | cached_property)
                    else getattr(kind, name)
                )
    yield from found.items()


def signature(title: str, thing: Any) -> str:
    """A block with the call, on one line where it fits."""
    found = inspect.signature(thing)
    parameters = list(found.parameters.values())
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    texts = []
    for before, parameter in zip([None, *parameters], parameters, strict=False):
        keyword = inspect.Parameter.KEYWORD_ONLY
        if parameter.kind is keyword and (before is None or before.kind is not keyword):
            texts.append("*")
        texts.append(_parameter(parameter))
    result = (
        ""
        if inspect.isclass(thing) or not found.return_annotation
        else f" -> {_type(found.return_annotation)}"
    )
    line = f"{title}({', '.join(texts)}){result}"
    if len(line) > LONGEST:
        line = "\n".join([f"{title}(", *(f"    {text}," for text in texts), f"){result}"])
    return f"```python\n{line}\n```"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(
        parameter.kind, ""
    )
    text = f"{stars}{parameter.name}: {_type(parameter.annotation)}"
    if parameter.default is inspect.Parameter.empty:
        return text
    default = repr(parameter.default)
    # an object's repr names its place in memory
    return f"{text} = {'...' if default.startswith('<') else default}"


def _type(annotation: Any) -> str:
    return (
        annotation
        if isinstance(annotation, str)
        else getattr(annotation, "__name__", str(annotation))
    )


def fields(settings: Any) -> str:
    """The keys of a settings class as a table: type, default, meaning."""
    types = {
        name: text
        for base in reversed(settings.__mro__)
        for name, text in inspect.get_annotations(base).items()
    }
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in settings.model_fields.items():
        section = hasattr(field.annotation, "model_fields")
        said = vars(field.annotation).get("__doc__") or "" if section else ""
        meaning = field.description or said.partition("\n")[0]
        rows.append(
            f"| `{name}` | `{_cell(types[name])}` | {_default(field, section)} | {_cell(meaning)} |"
        )
    return "\n".join(rows)


def _default(field: Any, section: bool) -> str:
    if field.is_required():
        return "required"
    if section:
        return "the section's own"
    value = field.default_factory() if field.default_factory else field.default
    return f"`{_cell(repr(value))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def docstring(thing: Any) -> Iterator[str]:
    """A Google-style docstring as Markdown: its prose, then one list per section."""
    lines = (inspect.getdoc(thing) or "").splitlines()
    starts = [number for number, line in enumerate(lines) if line in SECTIONS]
    prose = "\n".join(lines[: starts[0] if starts else None]).strip()
    if prose:
        yield prose
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=False):
        body = textwrap.dedent("\n".join(lines[start + 1 : stop])).strip()
        title = lines[start].rstrip(":")
        if title == "Returns":
            yield f"**{title}** {_joined(body)}"
        else:
            items = re.split(r"\n(?=\S)", body)
            texts = [re.sub(r"^(\w+):", r"`\1`:", _joined(item)) for item in items]
            yield f"**{title}**\n\n" + "\n".join(f"- {text}" for text in texts)


def _joined(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(generate(), encoding="utf-8")
    print(f"{PAGE}: {len(lidit.__all__) - 1} names")
