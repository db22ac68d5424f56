"""Writes which values a schema does not allow, where JSON Schema can say that without `not`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_engine.constraints.conjunctions import TYPES
from loraplex_engine.constraints.keywords import ENFORCED

if TYPE_CHECKING:
    from collections.abc import Iterable

Schema = dict[str, Any]

# Bound -> (type that it is for, bound that what is outside has, what is added to the bound).
_OUTSIDE: Final[dict[str, tuple[str, str, int]]] = {
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
}


def complement(schema: Any) -> list[Any] | None:
    """Return schemas that together allow just the values that a schema does not; None if they cannot be written.

    Args:
        schema: A schema as the library reads it.
    """
    if isinstance(schema, bool):
        return [] if schema else [True]
    found: list[Any] = []
    for key, value in schema.items():
        outside = _outside(key, value) if key in ENFORCED else []
        if outside is None:
            return None
        found += outside
    return found


def _outside(key: str, value: Any) -> list[Any] | None:
    """Return schemas of the values that one keyword does not allow; None if they cannot be written."""
    if key in _OUTSIDE:
        kind, bound, more = _OUTSIDE[key]
        if isinstance(value, bool):  # draft 4
            return None
        return [] if value + more < 0 and kind != "number" else [{"type": kind, bound: value + more}]
    if key == "type":
        names = {value} if isinstance(value, str) else set(value)
        is_part = "integer" in names and "number" not in names  # of the numbers: the rest of them cannot be written
        return None if is_part else _of_types(TYPES - names)
    if key == "const":
        return _but(value)
    if key == "required":
        return [{"type": "object", "properties": {name: False}} for name in value]
    if key == "properties":
        return _but_properties(value)
    if key == "allOf":
        parts = [complement(part) for part in value]
        return None if None in parts else [case for part in parts for case in part or ()]
    if key == "anyOf":
        parts = [complement(part) for part in value]
        return None if None in parts else [{"allOf": [{"anyOf": part or [False]} for part in parts]}]
    return None


def _of_types(names: Iterable[str]) -> list[Schema]:
    return [{"type": name} for name in sorted(names)]


def _but(value: Any) -> list[Any] | None:
    """Return schemas of all values but one."""
    if value is None:
        return _of_types(TYPES - {"null"})
    if isinstance(value, bool):
        return [*_of_types(TYPES - {"boolean"}), {"const": not value}]
    return None


def _but_properties(properties: Schema) -> list[Any] | None:
    found: list[Any] = []
    for name, schema in properties.items():
        outside = complement(schema)
        if outside is None:
            return None
        if outside:
            found.append({"type": "object", "properties": {name: {"anyOf": outside}}, "required": [name]})
    return found
