"""docs/recipe-reference.md is what the settings' types say."""

from pydantic import Field

from docs.generate_recipe_reference import PAGE, generate, tables
from lidit.config.settings import Settings


class Inner(Settings):
    """A section."""

    side: int = Field(3, ge=1, description="of a square | in pixels")


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    more: tuple[Inner, ...] = ()
    kind: str | None = None


def test_the_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == generate(), "run: make api"


def test_every_kind_of_key_has_its_row() -> None:
    first, heading, about, second = tables(Outer, "x.", set())
    assert "| `x.name` | text | required |  |" in first
    assert "| `x.inner` | section |  |  |" in first
    assert "| `x.more` | list of section | `[]` |  |" in first
    assert "| `x.kind` | text or none | `null` |  |" in first
    assert (heading, about) == ("### `x.inner`", "A section.")
    assert (
        "| `x.inner.side` | whole number | `3` | of a square \\| in pixels, at least 1 |" in second
    )
