"""What pydantic would quietly turn into another value: true into 1, 1 and "yes" into true, integers
without end.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError

LARGEST = 2**63 - 1  # of what integers are kept in: Arrow, NumPy, SQL
NUMBERS = {"int", "float", "literal"}  # pydantic takes true for the literal 1, too


def exact(schema: Any) -> Any:
    """A pydantic core schema in which booleans are booleans, numbers are none, and integers fit
    into 64 bits.
    """
    if isinstance(schema, list | tuple):
        return type(schema)(exact(entry) for entry in schema)
    if not isinstance(schema, dict):
        return schema
    made = {
        key: value if key in ("default", "metadata") else exact(value)
        for key, value in schema.items()
    }
    kind = made.get("type")
    if kind == "bool":
        made["strict"] = True
    if kind == "int" and not {"le", "lt"} & set(made):
        made["le"] = LARGEST
    if kind in NUMBERS:
        return {
            "type": "function-before",
            "function": {"type": "no-info", "function": _no_boolean},
            "schema": made,
        }
    return made


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "must not be true or false")
    return value
