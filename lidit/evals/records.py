"""JSON that other programs wrote: results of official scorers, prompt lists."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 64


def read_record(text: str) -> Any:
    """One JSON value. Raises ValueError for what is none, for texts with half a character, for
    nesting without end.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level = [value]
    for _ in range(DEEPEST):
        if not level:
            break
        level = [child for parent in level for child in _children(parent)]
    else:
        raise ValueError(f"nested more than {DEEPEST} deep")
    if "\\u" in text:  # an escape can spell one half of a pair
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _children(value: Any) -> list[Any]:
    return (
        list(value.values())
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else []
    )
