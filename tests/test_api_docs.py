"""docs/api.md is what the docstrings say, and the docstrings say everything about what `lidit`
exports.
"""

import inspect
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from typing import Any

import pytest

import lidit
from docs.generate_api import GIVEN, GROUPS, PAGE, docstring, generate, made_by_users, members


def documented() -> Iterator[tuple[str, Any]]:
    """Every function, method and class of the page whose arguments the page explains."""
    exported = [(name, getattr(lidit, name)) for names in GROUPS.values() for name in names]
    places = [place.partition(":") for given in GIVEN.values() for place in given]
    given = [(name, getattr(import_module(module), name)) for module, _, name in places]
    for name, thing in [*exported, *given]:
        if not inspect.isclass(thing):
            yield name, thing
        elif not hasattr(thing, "model_fields"):
            if made_by_users(thing):
                yield name, thing
            yield from ((f"{name}.{attribute}", member) for attribute, member in members(thing))


def sections(thing: Any) -> dict[str, list[str]]:
    """Title -> names explained, from the text of `inspect.getdoc`."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line in ("Args:", "Returns:", "Raises:"):
            title = line[:-1]
            found[title] = []
        elif title and line.startswith("    ") and not line.startswith("     "):
            found[title].append(line.strip().partition(":")[0])
    return found


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == generate(), "run: make api"


def test_every_exported_name_has_its_place_on_the_page() -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert sorted([*names, "__version__"]) == sorted(lidit.__all__)


@pytest.mark.parametrize(
    ("name", "thing"), [pytest.param(*pair, id=pair[0]) for pair in documented()]
)
def test_docstrings_explain_every_argument_and_result(name: str, thing: Any) -> None:
    assert inspect.getdoc(thing), name
    if isinstance(thing, property | cached_property):
        return
    signature = inspect.signature(thing)
    found = sections(thing)
    assert found.get("Args", []) == [
        parameter for parameter in signature.parameters if parameter != "self"
    ], name
    if not inspect.isclass(thing) and signature.return_annotation not in (None, "None"):
        assert found.get("Returns"), name


def test_a_section_becomes_a_list_and_long_items_stay_whole() -> None:
    def area(width: int, height: int) -> int:
        """The area.

        Args:
            width: In pixels,
                from 1.
            height: In pixels.

        Returns:
            Square
            pixels.
        """
        return width * height

    assert list(docstring(area)) == [
        "The area.",
        "**Args**\n\n- `width`: In pixels, from 1.\n- `height`: In pixels.",
        "**Returns** Square pixels.",
    ]
