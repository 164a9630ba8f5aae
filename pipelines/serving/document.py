"""The OpenAPI document: what the framework writes, with our one shape of errors and the key that
every call needs.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pipelines.serving.edge import API, FILES

PUBLISHED = "1"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
TOLD = {
    "description": "An error, as OpenAI's clients read it. `x-should-retry` says whether to ask "
    "again.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
PICTURE = {
    "required": True,
    "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
}


def describe(app: FastAPI) -> None:
    """Put the document in the place of the framework's own; it is made once, when it is first asked
    for.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=PUBLISHED, routes=app.routes)
    parts = found.setdefault("components", {})
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schemas = {
        name: schema
        for name, schema in parts.get("schemas", {}).items()
        if "ValidationError" not in name
    }
    parts["schemas"] = {**schemas, "Error": ERROR}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # what does not fit is 400
            operation["responses"]["default"] = TOLD
            if path.startswith(API) and not path.startswith(FILES):
                operation["security"] = [{"key": []}]
    found["paths"]["/v1/verify"]["post"]["requestBody"] = PICTURE
    return found
