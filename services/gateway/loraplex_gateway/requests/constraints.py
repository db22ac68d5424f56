"""What can be said of a constraint before an engine compiles it: cheap checks, the same for both APIs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.request_limits import MAX_CHOICES, MAX_CONSTRAINT_BYTES, MAX_CONSTRAINT_DEPTH
from loraplex_common.structured_output import ConstraintKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.structured_output import StructuredOutput

Violation = tuple[str, str]

FIELD: Final = "structured_output"
MAX_STARTS_AFTER: Final = 64
_JSON_TEXTS: Final = {ConstraintKind.JSON_SCHEMA: (dict, bool), ConstraintKind.STRUCTURAL_TAG: (dict,)}


def violations(wanted: StructuredOutput | None) -> Iterator[Violation]:
    """Yield what is wrong with a constraint, whatever the model; the engine says what cannot be compiled."""
    if wanted is None:
        return
    if (count := len(wanted.starts_after)) > MAX_STARTS_AFTER:
        field = f"{FIELD}.starts_after"
        yield field, f"{field} has {count} entries; at most {MAX_STARTS_AFTER} are allowed"
    field = f"{FIELD}.{wanted.kind.value}"
    num_bytes = len(wanted.text.encode(errors="surrogatepass"))
    if num_bytes > MAX_CONSTRAINT_BYTES:
        yield field, f"{field} has {num_bytes} bytes; at most {MAX_CONSTRAINT_BYTES} are allowed"
    elif not wanted.text and wanted.kind is not ConstraintKind.JSON_OBJECT:
        yield field, f"{field} is empty; leave it out for an output without constraint"
    elif not _is_unicode(wanted.text):
        yield field, f"{field} is no valid Unicode: lone surrogates cannot be encoded as UTF-8"
    elif wanted.kind is ConstraintKind.CHOICE:
        yield from _choice_violations(field, json.loads(wanted.text))
    elif wanted.kind in _JSON_TEXTS:
        yield from _json_violations(field, wanted)


def _choice_violations(field: str, choices: list[str]) -> Iterator[Violation]:
    if not 1 <= len(choices) <= MAX_CHOICES:
        yield field, f"{field} has {len(choices)} entries; it must have 1 to {MAX_CHOICES}"
    elif "" in choices:
        at = f"{field}[{choices.index('')}]"
        yield at, f"{at} is empty; an output has at least one character"


def _json_violations(field: str, wanted: StructuredOutput) -> Iterator[Violation]:
    try:
        value = json.loads(wanted.text)
    except RecursionError:
        yield field, f"{field} is nested deeper than {MAX_CONSTRAINT_DEPTH}"
        return
    except ValueError as error:
        yield field, f"{field} is no JSON: {error}"
        return
    if not isinstance(value, _JSON_TEXTS[wanted.kind]):
        yield field, f"{field} is {_kind_of(value)}; it must be a JSON object"
    elif _is_deeper(value, MAX_CONSTRAINT_DEPTH):
        yield field, f"{field} is nested deeper than {MAX_CONSTRAINT_DEPTH}"


def _is_deeper(value: Any, depth: int) -> bool:
    """Return whether a value is nested deeper than this; at that depth the search ends."""
    if not isinstance(value, dict | list):
        return False
    return depth == 0 or any(
        _is_deeper(inner, depth - 1) for inner in (value.values() if isinstance(value, dict) else value)
    )


def _kind_of(value: Any) -> str:
    names = {str: "a string", bool: "a truth value", type(None): "null", list: "a list"}
    return names.get(type(value), "a number")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
