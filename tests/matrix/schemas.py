"""The two schemas, as shipped and without room for fields that they do not name."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import jsonschema
from referencing import Registry, Resource

RESULTS = ("sdpo_conformance.report", "results.schema.json")
MATRIX = ("sdpo_conformance.matrix", "matrix.schema.json")


def schema(package: str, name: str) -> Any:
    return json.loads((resources.files(package) / name).read_text(encoding="utf-8"))


def closed(part: Any) -> Any:
    """A schema in which an object with named properties may have no others."""
    if isinstance(part, list):
        return [closed(one) for one in part]
    if not isinstance(part, dict):
        return part
    inner = {key: value if key in ("if", "then", "else") else closed(value) for key, value in part.items()}
    if part.get("type") == "object" and "properties" in part:
        inner.setdefault("additionalProperties", False)
    return inner


def validator(which: tuple[str, str], strict: bool = False) -> jsonschema.Draft202012Validator:
    """A validator for one of the two, which knows the other."""
    change = closed if strict else lambda part: part
    results, wanted = change(schema(*RESULTS)), change(schema(*which))
    registry: Registry[Any] = Registry().with_resource(results["$id"], Resource.from_contents(results))
    return jsonschema.Draft202012Validator(wanted, registry=registry)
