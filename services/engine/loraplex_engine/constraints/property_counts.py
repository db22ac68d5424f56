"""Writes minProperties and maxProperties beside optional properties as the combinations of those that they allow.

The library counts names only where all properties are required. A choice between schemas that say which of the optional
properties are there, and which are not, says the same.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

from loraplex_engine.constraints.schema_values import not_objects, unsupported

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Schema = dict[str, Any]

MAX_COMBINATIONS: Final = 128
COUNTS: Final = ("minProperties", "maxProperties")


def with_combinations(schema: Schema, place: str) -> Schema:
    """Return a schema that says the same and counts names only where the library does.

    Args:
        schema: A schema that is ready for the library but for its counts of properties.
        place: Where it is, for refusals.

    Raises:
        ConstraintTextError: If an output could reach the count by repeating a name, or there are too many combinations.
    """
    if not any(key in schema for key in COUNTS):
        return schema
    required, least, most = set(schema.get("required", ())), schema.get("minProperties", 0), schema.get("maxProperties")
    has_more = schema.get("additionalProperties", True) is not False or bool(schema.get("patternProperties"))
    if has_more and least > len(required) + 1:
        raise unsupported(
            "minProperties",
            place,
            "more than one name beyond the required ones may be the same twice; require the names, or list them under "
            "properties with additionalProperties: false",
        )
    if most is not None and max(least, len(required)) > most:
        return _either(schema, [])
    properties = schema.get("properties", {})
    optional = [name for name in properties if name not in required and properties[name] is not False]
    if not optional:
        return schema
    bounds = _Bounds(len(required), least, most)
    count = bounds.num_alternatives(len(optional), has_more=has_more)
    if count > MAX_COMBINATIONS:
        raise unsupported(
            "minProperties" if least else "maxProperties",
            place,
            f"it allows {count} combinations of the optional properties; at most {MAX_COMBINATIONS} are taken: require "
            "some of them, or leave the count out and check the output",
        )
    return _either(schema, bounds.alternatives(optional, has_more=has_more))


class _Bounds:
    """How many of the optional and additional names there may be.

    Args:
        num_required: Names that are there anyway.
        least: The value of minProperties.
        most: The value of maxProperties; None for no bound.
    """

    def __init__(self, num_required: int, least: int, most: int | None) -> None:
        self._counts = {key: value for key, value in zip(COUNTS, (least, most), strict=True) if value is not None}
        self._low = max(0, least - num_required)
        self._high = None if most is None else most - num_required

    def num_alternatives(self, num_optional: int, *, has_more: bool) -> int:
        """Return how many schemas `alternatives` yields."""
        if self._high is None or (self._high >= num_optional and not has_more):
            return math.comb(num_optional, self._low) + (1 if has_more and self._low else 0)
        if not has_more and not self._low:
            return math.comb(num_optional, self._high)
        least = 0 if has_more else self._low
        return sum(math.comb(num_optional, size) for size in range(least, min(self._high, num_optional) + 1))

    def alternatives(self, optional: list[str], *, has_more: bool) -> Iterator[Schema]:
        """Yield schemas one of which an object fits just if it has as many names as are allowed.

        Args:
            optional: The optional properties.
            has_more: Whether there may be names that are not listed.
        """
        if self._high is None or (self._high >= len(optional) and not has_more):
            yield from ({"required": list(present)} for present in combinations(optional, self._low))
            if has_more and self._low:
                yield {"properties": _absent(optional), **self._counts}
        elif not has_more and not self._low:
            for allowed in combinations(optional, self._high):
                yield {"properties": _absent(name for name in optional if name not in allowed)}
        else:
            for size in range(0 if has_more else self._low, min(self._high, len(optional)) + 1):
                for present in combinations(optional, size):
                    absent = _absent(name for name in optional if name not in present)
                    yield {"required": list(present), "properties": absent} | (self._counts if has_more else {})


def _absent(names: Iterable[str]) -> Schema:
    return dict.fromkeys(names, False)


def _either(schema: Schema, alternatives: Iterable[Schema]) -> Schema:
    """Return a schema whose objects fit one of the alternatives as well."""
    rest = {key: value for key, value in schema.items() if key not in COUNTS}
    objects = [{"type": "object", **alternative} for alternative in alternatives]
    others = [] if schema.get("type") == "object" else not_objects()
    return rest | {"allOf": [*rest.get("allOf", []), {"anyOf": [*objects, *others] or [False]}]}
