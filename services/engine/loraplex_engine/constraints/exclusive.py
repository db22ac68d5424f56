"""Proves that no value satisfies two options of a oneOf, which then says the same as anyOf."""

from __future__ import annotations

from itertools import combinations
from typing import Any, Final
from urllib.parse import unquote

TYPES: Final = frozenset({"array", "boolean", "null", "number", "object", "string"})
MAX_PAIRS: Final = 2_000
MAX_DEPTH: Final = 8


def are_exclusive(options: list[Any], root: dict[str, Any]) -> bool:
    """Return whether each two options are proven to have no value in common.

    Args:
        options: The options of a oneOf.
        root: The whole schema, which references point into.
    """
    schemas = [_resolved(option, root) for option in options]
    if _have_a_discriminator(schemas, root):
        return True
    if len(schemas) * (len(schemas) - 1) // 2 > MAX_PAIRS:
        return False
    return all(_is_disjoint(one, other, root, MAX_DEPTH) for one, other in combinations(schemas, 2))


def _have_a_discriminator(schemas: list[Any], root: dict[str, Any]) -> bool:
    """Return whether all options are objects with a required property whose values they do not share."""
    if not all(isinstance(schema, dict) and _types(schema) == {"object"} for schema in schemas):
        return False
    for name in schemas[0].get("required", ()) if schemas else ():
        seen: set[str] = set()
        for schema in schemas:
            values = _texts(_property(schema, name, root)) if name in schema.get("required", ()) else None
            if values is None or values & seen:
                break
            seen |= values
        else:
            return True
    return False


def _texts(schema: Any) -> set[str] | None:
    values = _values(schema)
    return {value for value in values if isinstance(value, str)} if values and _all_texts(values) else None


def _all_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_disjoint(one: Any, other: Any, root: dict[str, Any], depth: int) -> bool:
    one, other = _resolved(one, root), _resolved(other, root)
    if one is False or other is False:
        return True
    if depth == 0 or not isinstance(one, dict) or not isinstance(other, dict):
        return False
    types = _types(one) & _types(other)
    if not types:
        return True
    values = _values(one), _values(other)
    if values[0] is not None and values[1] is not None:
        return not any(_is_equal(left, right) for left in values[0] for right in values[1])
    if types != {"object"}:
        return False
    names = {*one.get("required", ()), *other.get("required", ())}
    return any(
        _is_disjoint(_property(one, name, root), _property(other, name, root), root, depth - 1) for name in names
    )


def _property(schema: dict[str, Any], name: str, root: dict[str, Any]) -> Any:
    return _resolved(schema.get("properties", {}).get(name, True), root)


def _values(schema: Any) -> list[Any] | None:
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _types(schema: dict[str, Any]) -> set[str]:
    named = schema.get("type")
    types = set(TYPES)
    if named is not None:
        names = [named] if isinstance(named, str) else named
        types &= {"number" if name == "integer" else name for name in names}
    values = _values(schema)
    return types if values is None else types & {_type_of(value) for value in values}


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def _is_equal(one: Any, other: Any) -> bool:
    """Compare as JSON does: 1 equals 1.0, and not true. Lists and objects count as equal, which proves nothing."""
    if isinstance(one, list | dict) or isinstance(other, list | dict):
        return _type_of(one) == _type_of(other)
    return _type_of(one) == _type_of(other) and bool(one == other)


def _resolved(schema: Any, root: dict[str, Any]) -> Any:
    """Return what a schema that is only a reference into the same text points to."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, dict) or "$ref" not in schema or "properties" in schema or "type" in schema:
            return schema
        reference = schema["$ref"]
        if not isinstance(reference, str) or not reference.startswith("#/") or "$id" in root:
            return schema
        schema = _at(root, reference)
    return schema


def _at(root: Any, reference: str) -> Any:
    found = root
    for part in unquote(reference[2:]).split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or key not in found:
            return True
        found = found[key]
    return found
