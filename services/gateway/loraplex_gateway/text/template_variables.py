"""What clients may hand to a chat template: JSON values, under names that have no other meaning."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.text.chat_template import RESERVED_VARIABLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FIELD: Final = "chat_template_kwargs"
MAX_BYTES: Final = 16 * 1024  # as JSON
MAX_DEPTH: Final = 8


def violations(variables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (field, what is wrong) for names that cannot be set and values that no template should get."""
    for name, value in variables.items():
        field = f"{FIELD}.{name[:64]}"
        if name in RESERVED_VARIABLES:
            yield field, f"{field} cannot be set: the chat template has it from elsewhere, or it is not supported"
        elif not name.isidentifier():
            yield field, f"{field}: the name of a template's variable has letters, digits and _ only"
        elif (problem := json_problem(value, MAX_DEPTH)) is not None:
            yield field, f"{field} {problem}"
    if (num_bytes := _num_bytes(variables)) > MAX_BYTES:
        yield FIELD, f"{FIELD} has {num_bytes} bytes as JSON; at most {MAX_BYTES} are allowed"


def from_json(texts: Mapping[str, str]) -> dict[str, Any]:
    """Read variables whose values are JSON texts.

    Raises:
        InvalidParameterError: If one is no JSON; the variable is named.
    """
    if sum(len(name) + len(text) for name, text in texts.items()) > MAX_BYTES:
        raise InvalidParameterError(f"{FIELD} is too long: at most {MAX_BYTES} bytes are allowed", field=FIELD)
    variables = {}
    for name, text in texts.items():
        try:
            variables[name] = json.loads(text)
        except (ValueError, RecursionError) as error:
            field = f"{FIELD}.{name[:64]}"
            raise InvalidParameterError(
                f"{field} is no JSON value ({error}); a string needs its quotes, true and false are small", field=field
            ) from error
    return variables


def json_problem(value: object, max_depth: int) -> str | None:
    """Return why a value is no JSON, or deeper than it may be; at that depth it stops, however deep it goes."""
    return _problem(value, max_depth, max_depth)


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8: lone surrogates cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _problem(value: object, depth: int, max_depth: int) -> str | None:
    if isinstance(value, dict | list):
        if depth == 0:
            return f"is nested deeper than {max_depth}"
        children = [*value, *value.values()] if isinstance(value, dict) else value
        return next((found for child in children if (found := _problem(child, depth - 1, max_depth)) is not None), None)
    if isinstance(value, float) and not math.isfinite(value):
        return "holds a number that JSON does not have"
    if isinstance(value, str) and not is_unicode(value):
        return "holds lone surrogates, which cannot be encoded as UTF-8"
    return None


def _num_bytes(variables: Mapping[str, Any]) -> int:
    try:
        return len(json.dumps(variables, ensure_ascii=False).encode("utf-8", errors="surrogatepass"))
    except RecursionError:
        return 0  # refused for its depth
