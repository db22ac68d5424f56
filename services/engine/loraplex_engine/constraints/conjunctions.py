"""What several schemas that all must hold say together of types, values, ranges, items and properties."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Final

TYPES: Final = frozenset({"array", "boolean", "null", "number", "object", "string"})
KINDS: Final = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}


class Conjunction:
    """Schemas that all must hold; what they say in other keywords only narrows it further.

    Args:
        conjuncts: The schemas, objects.
    """

    def __init__(self, conjuncts: list[dict[str, Any]]) -> None:
        self.conjuncts = conjuncts

    @cached_property
    def types(self) -> set[str]:
        """The types that values may have; integers are numbers."""
        types = set(TYPES)
        for conjunct in self.conjuncts:
            types &= types_of(conjunct)
        return types

    @cached_property
    def required(self) -> set[str]:
        """Names that objects must have."""
        return {name for conjunct in self.conjuncts for name in conjunct.get("required", ())}

    @cached_property
    def values(self) -> list[Any] | None:
        """Values of one of the schemas that lists them; None if none does."""
        found = (values_of(conjunct) for conjunct in self.conjuncts)
        return min((values for values in found if values is not None), key=len, default=None)

    def least(self, key: str) -> int:
        """Return the largest lower bound of this keyword; 0 without any."""
        return max((int(conjunct.get(key, 0)) for conjunct in self.conjuncts), default=0)

    def most(self, key: str) -> float:
        """Return the smallest upper bound of this keyword."""
        return min((conjunct.get(key, math.inf) for conjunct in self.conjuncts), default=math.inf)

    def is_empty_range(self, low: str, high: str) -> bool:
        """Return whether no count is within both bounds."""
        return self.least(low) > self.most(high)

    @property
    def has_no_number(self) -> bool:
        """Whether no number is within the bounds."""
        low = max((bound for conjunct in self.conjuncts if (bound := _lower(conjunct))), default=(-math.inf, 0))
        high = min((bound for conjunct in self.conjuncts if (bound := _upper(conjunct))), default=(math.inf, 0))
        if low[0] > high[0] or (low[0] == high[0] and bool(low[1] or high[1])):
            return True
        if not any(is_integer(conjunct) for conjunct in self.conjuncts) or not math.isfinite(low[0] + high[0]):
            return False
        first = math.floor(low[0]) + 1 if low[1] else math.ceil(low[0])
        last = math.ceil(high[0]) - 1 if high[1] else math.floor(high[0])
        return first > last

    def item(self, at: int) -> list[Any]:
        """Return the schemas of the item at this place."""
        return [_item(conjunct, at) for conjunct in self.conjuncts]

    def property(self, name: str) -> list[Any]:
        """Return schemas of the property of this name; those of patterns, which it may match, are left out."""
        return [_property(conjunct, name) for conjunct in self.conjuncts]


def types_of(schema: dict[str, Any]) -> set[str]:
    """Return the types that a schema itself allows."""
    named = schema.get("type")
    types = set(TYPES)
    if named is not None:
        names = [named] if isinstance(named, str) else named
        types &= {"number" if name == "integer" else name for name in names}
    values = values_of(schema)
    return types if values is None else types & {type_of(value) for value in values}


def values_of(schema: dict[str, Any]) -> list[Any] | None:
    """Return the values of const or enum; None without them."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def type_of(value: Any) -> str:
    """Return the type of a JSON value; integers are numbers."""
    return "null" if value is None else KINDS[type(value)]


def is_integer(schema: dict[str, Any]) -> bool:
    """Return whether a schema's numbers are integers."""
    named = schema.get("type")
    return named == "integer" or (isinstance(named, list) and "integer" in named and "number" not in named)


def is_equal(one: Any, other: Any) -> bool:
    """Compare as JSON does: 1 equals 1.0, and not true."""
    if type_of(one) != type_of(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(is_equal(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def refuses(schema: Any, value: Any) -> bool:
    """Return whether a value surely does not satisfy a schema; its references and combinations are not looked at."""
    if not isinstance(schema, dict):
        return schema is False
    if "$ref" in schema:
        return False
    kind, values = type_of(value), values_of(schema)
    if kind not in types_of(schema) or (values is not None and not any(is_equal(value, known) for known in values)):
        return True
    alone = Conjunction([schema])
    if kind == "number":
        is_fraction = is_integer(schema) and value != int(value)
        return is_fraction or Conjunction([schema, {"minimum": value, "maximum": value}]).has_no_number
    if kind == "string":
        return not alone.least("minLength") <= len(value) <= alone.most("maxLength")
    if kind == "array":
        is_outside = not alone.least("minItems") <= len(value) <= alone.most("maxItems")
        return is_outside or any(refuses(_item(schema, at), item) for at, item in enumerate(value))
    if kind == "object":
        is_outside = not alone.least("minProperties") <= len(value) <= alone.most("maxProperties")
        lacks = bool(alone.required - value.keys())
        return is_outside or lacks or any(refuses(_property(schema, name), item) for name, item in value.items())
    return False


def _item(schema: dict[str, Any], at: int) -> Any:
    items = schema.get("items", True)
    prefix, rest = (items, schema.get("additionalItems", True)) if isinstance(items, list) else ([], items)
    prefix = schema.get("prefixItems", prefix)
    return prefix[at] if at < len(prefix) else rest


def _property(schema: dict[str, Any], name: str) -> Any:
    properties = schema.get("properties", {})
    if name in properties:
        return properties[name]
    return True if schema.get("patternProperties") else schema.get("additionalProperties", True)


def _lower(schema: dict[str, Any]) -> tuple[float, int] | None:
    """Return the lower bound of a schema's numbers, and 1 if it is excluded."""
    return _bound(schema, "minimum", "exclusiveMinimum", 1, max)


def _upper(schema: dict[str, Any]) -> tuple[float, int] | None:
    """Return the upper bound of a schema's numbers, and -1 if it is excluded."""
    return _bound(schema, "maximum", "exclusiveMaximum", -1, min)


def _bound(schema: dict[str, Any], key: str, exclusive: str, mark: int, tighter: Any) -> tuple[float, int] | None:
    plain, excluded = schema.get(key), schema.get(exclusive, False)
    if isinstance(excluded, bool):  # draft 4: whether the other bound is excluded
        return None if plain is None else (plain, mark if excluded else 0)
    bounds = [(excluded, mark), *([] if plain is None else [(plain, 0)])]
    return tighter(bounds) if bounds else None
