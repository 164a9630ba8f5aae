"""Small JSON files of ours, read after a full disk, a torn copy or a hostile hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lidit.errors import InputError, one_line


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError with the remedy where it is missing, torn or of
    another kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error, 200)}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; {remedy}")
    return value
