"""Writes oneOf as anyOf: as it is if no value is proven to satisfy two options, else each option without the others.

What is not understood narrows a schema or leaves it as it is, so it is left out: a proof may be missed, but never wrong.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from loraplex_engine.constraints.complements import complement
from loraplex_engine.constraints.conjunctions import Conjunction, refuses

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PAIRS: Final = 2_000
MAX_DEPTH: Final = 8
MAX_PARTS: Final = 64
"""Schemas of what options do not allow: the library multiplies them out."""
MAX_STEPS: Final = 20_000
"""Comparisons of one proof: a schema may nest choices in choices."""
LAST_DRAFT_THAT_HIDES: Final = 7
"""Up to it a $ref hides what stands beside it."""


def cases_of(options: list[Any], root: dict[str, Any], *, draft: int, has_ids: bool) -> list[Any] | None:
    """Return schemas whose anyOf says what the oneOf of the options says; None if none are found.

    They are the options themselves if each two are proven to have no value in common, else each without the others.

    Args:
        options: The options of a oneOf.
        root: The whole schema as the library reads it, which references point into.
        draft: The draft of JSON Schema that it is written in.
        has_ids: Whether it has documents of its own, named by $id; then no reference is followed.
    """
    prover = _Prover(root, hides_siblings=draft <= LAST_DRAFT_THAT_HIDES, has_ids=has_ids)
    flat = [prover.flat(option, MAX_DEPTH) for option in options]
    if _have_a_discriminator([conjuncts for conjuncts in flat if conjuncts is not None]):
        return options
    if len(options) * (len(options) - 1) // 2 > MAX_PAIRS:
        return None
    meeting = [
        (one, other)
        for one, other in combinations(range(len(options)), 2)
        if not prover.is_disjoint(options[one], options[other], MAX_DEPTH)
    ]
    return options if not meeting else _without_others(options, meeting)


def _without_others(options: list[Any], meeting: list[tuple[int, int]]) -> list[Any] | None:
    """Return each option without the values of those that it may have values in common with; None if that is too much."""
    outside = {at: complement(options[at]) for pair in meeting for at in pair}
    cases, num_parts = [], 0
    for at, option in enumerate(options):
        others = [outside[one if other == at else other] for one, other in meeting if at in (one, other)]
        parts = [{"anyOf": part or [False]} for part in others if part is not None]
        num_parts += sum(len(part["anyOf"]) for part in parts)
        if len(parts) < len(others) or num_parts > MAX_PARTS:
            return None
        cases.append({"allOf": [option, *parts]} if parts else option)
    return cases


def _have_a_discriminator(options: list[list[dict[str, Any]]]) -> bool:
    """Return whether all options are objects with a required property whose values they do not share."""
    schemas = [Conjunction(conjuncts) for conjuncts in options]
    if not all(schema.types == {"object"} for schema in schemas):
        return False
    for name in schemas[0].required if schemas else ():
        seen: set[str] = set()
        for schema in schemas:
            values = _texts(schema, name) if name in schema.required else None
            if values is None or values & seen:
                break
            seen |= values
        else:
            return True
    return False


def _texts(schema: Conjunction, name: str) -> set[str] | None:
    found = Conjunction([part for part in schema.property(name) if isinstance(part, dict)]).values
    return set(found) if found and all(isinstance(value, str) for value in found) else None


class _Prover:
    def __init__(self, root: dict[str, Any], *, hides_siblings: bool, has_ids: bool) -> None:
        self._root = root
        self._hides_siblings = hides_siblings
        self._has_ids = has_ids
        self._num_steps = 0

    def is_disjoint(self, one: Any, other: Any, depth: int) -> bool:
        """Return whether two schemas are proven to have no value in common."""
        self._num_steps += 1
        if depth == 0 or self._num_steps > MAX_STEPS:
            return False
        left, right = self.flat(one, depth), self.flat(other, depth)
        if left is None or right is None:
            return True
        if self._has_no_common_type(left, right, depth):
            return True
        return self._is_disjoint_in_each_case(left, right, depth) or self._is_disjoint_in_each_case(right, left, depth)

    def flat(self, schema: Any, depth: int) -> list[dict[str, Any]] | None:
        """Return objects that all must hold: the schema with those of its allOf and $ref; None for one without values."""
        if schema is False:
            return None
        self._num_steps += 1
        if not isinstance(schema, dict) or self._num_steps > MAX_STEPS:
            return []
        target = self._target(schema) if depth else None
        if "$ref" in schema and self._hides_siblings:
            return [] if target is None else self.flat(target, depth - 1)
        found = [schema]
        for part in [*schema.get("allOf", ()), *([] if target is None else [target])] if depth else ():
            more = self.flat(part, depth - 1)
            if more is None:
                return None
            found += more
        return found

    def _target(self, schema: dict[str, Any]) -> Any:
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/") or self._has_ids:
            return None
        found: Any = self._root
        for part in unquote(reference[2:]).split("/"):
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or key not in found:
                return None
            found = found[key]
        return found

    def _is_disjoint_in_each_case(self, one: list[dict[str, Any]], other: list[dict[str, Any]], depth: int) -> bool:
        """Return whether a choice of one schema has no case with a value in common with the other."""
        for at, conjunct in enumerate(one):
            for key in ("anyOf", "oneOf"):
                cases = conjunct.get(key)
                if not isinstance(cases, list) or not cases:
                    continue
                rest = [*one[:at], {name: value for name, value in conjunct.items() if name != key}, *one[at + 1 :]]
                plain = [
                    {name: value for name, value in part.items() if name not in ("allOf", "$ref")} for part in rest
                ]
                if all(self.is_disjoint({"allOf": [case, *plain]}, {"allOf": other}, depth - 1) for case in cases):
                    return True
        return False

    def _has_no_common_type(self, left: list[dict[str, Any]], right: list[dict[str, Any]], depth: int) -> bool:
        both = Conjunction([*left, *right])
        if (values := both.values) is not None:
            return all(any(refuses(conjunct, value) for conjunct in both.conjuncts) for value in values)
        is_empty: dict[str, Callable[[], bool]] = {
            "number": lambda: both.has_no_number,
            "string": lambda: both.is_empty_range("minLength", "maxLength"),
            "array": lambda: self._has_no_array(Conjunction(left), Conjunction(right), both, depth),
            "object": lambda: self._has_no_object(Conjunction(left), Conjunction(right), both, depth),
        }
        return all(name in is_empty and is_empty[name]() for name in both.types)

    def _has_no_array(self, one: Conjunction, other: Conjunction, both: Conjunction, depth: int) -> bool:
        if both.is_empty_range("minItems", "maxItems"):
            return True
        first = range(min(both.least("minItems"), MAX_DEPTH))
        return any(self.is_disjoint({"allOf": one.item(at)}, {"allOf": other.item(at)}, depth - 1) for at in first)

    def _has_no_object(self, one: Conjunction, other: Conjunction, both: Conjunction, depth: int) -> bool:
        if max(both.least("minProperties"), len(both.required)) > both.most("maxProperties"):
            return True
        return any(
            self.is_disjoint({"allOf": one.property(name)}, {"allOf": other.property(name)}, depth - 1)
            for name in both.required
        )
