"""Checks the values of single keywords of a schema, and rewrites those that the library reads otherwise."""

from __future__ import annotations

import re
from typing import Any, Final

from loraplex_engine.constraints.conjunctions import is_integer
from loraplex_engine.constraints.json_text import MAX_EXACT_INTEGER, ConstraintTextError
from loraplex_engine.constraints.keywords import BOUNDS
from loraplex_engine.constraints.limits import MAX_LITERAL_BYTES
from loraplex_engine.constraints.patterns import PatternError, to_library

TYPES: Final = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_UNSPEAKABLE: Final = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that JSON spells with \\u only, and halves of characters."""


def not_numbers() -> list[dict[str, str]]:
    """Return schemas that together allow all values but numbers."""
    return [{"type": name} for name in ("null", "boolean", "string", "array", "object")]


def not_objects() -> list[dict[str, str]]:
    """Return schemas that together allow all values but objects."""
    return [{"type": name} for name in ("null", "boolean", "string", "number", "array")]


def read_pattern(pattern: Any, key: str, place: str) -> str:
    """Return a regular expression in the library's dialect."""
    if not isinstance(pattern, str):
        raise ConstraintTextError(f"keyword {key!r} at {place} must have a regular expression")
    try:
        return to_library(pattern)
    except PatternError as error:
        raise unsupported(key, place, f"in {pattern[:80]!r} {error}") from None


def read_count(value: Any, key: str, place: str) -> int:
    """Return a count as an integer; JSON may write it as 2.0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MAX_EXACT_INTEGER or value != int(value):
        raise ConstraintTextError(f"keyword {key!r} at {place} must have a whole number from 0 on")
    return int(value)


def check_numbers(schema: dict[str, Any], place: str) -> None:
    """Refuse bounds and factors of a schema that are no numbers, or cannot be compared exactly."""
    for key in (*BOUNDS, "multipleOf"):
        if key not in schema:
            continue
        value = schema[key]
        if isinstance(value, bool) and key.startswith("exclusive"):
            continue  # draft 4
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConstraintTextError(f"keyword {key!r} at {place} must have a number")
        # Bounds of integers are compared as binary64 and then in 64 bits.
        if abs(value) > MAX_EXACT_INTEGER and not (is_integer(schema) and _is_exact_bound(value, key)):
            raise too_large(key, place, value)


def _is_exact_bound(value: float, key: str) -> bool:
    """Return whether a bound of integers keeps its value in binary64 and in 64 bits, where 2^63 - 1 is what 2^63 becomes."""
    if key not in ("minimum", "maximum") or value != int(value):
        return False
    return is_exact(value) or (key == "maximum" and value == 2**63 - 1)


def is_exact(value: float) -> bool:
    """Return whether a number is one of binary64 within 64 bits."""
    return -(2**63) < value < 2**63 and int(float(value)) == value


def too_large(key: str, place: str, value: float) -> ConstraintTextError:
    """Return the refusal of a number."""
    return unsupported(
        key,
        place,
        f"{value} is too large to be compared exactly; beyond 2^53 there are bounds of type integer, const and enum, "
        "with whole numbers of binary64 within 63 bits",
    )


def check_value(value: Any, key: str, place: str) -> None:
    """Refuse numbers that the library would round, and texts that make masks slow."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str):
            check_text(item, key, place)
        elif (isinstance(item, int) and not is_exact(item)) or (
            isinstance(item, float) and abs(item) > MAX_EXACT_INTEGER
        ):
            raise too_large(key, place, item)


def check_text(text: str, key: str, place: str) -> None:
    """Refuse a text that makes masks slow, or that outputs cannot spell."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_LITERAL_BYTES:
        raise unsupported(key, place, f"a text is longer than {MAX_LITERAL_BYTES} bytes")
    if found := _UNSPEAKABLE.search(text):
        raise unsupported(key, place, f"outputs cannot have the character U+{ord(found[0]):04X}")


def escaped(key: str) -> str:
    """Return a key as a part of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")


def unsupported(key: str, place: str, remedy: str) -> ConstraintTextError:
    """Return the refusal of a keyword."""
    return ConstraintTextError(f"keyword {key!r} at {place} cannot be enforced: {remedy}")


def check_type(value: Any, place: str) -> None:
    """Refuse what names no type of JSON."""
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in TYPES for name in names):
        raise ConstraintTextError(f"keyword 'type' at {place} must have one or more of {', '.join(sorted(TYPES))}")


def check_names(value: Any, key: str, place: str) -> None:
    """Refuse what is no list of names, and names that make masks slow."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConstraintTextError(f"keyword {key!r} at {place} must have a list of names")
    for name in value:
        check_text(name, key, place)
