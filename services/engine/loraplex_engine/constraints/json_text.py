"""Reads the JSON that constraints are written in."""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

from loraplex_engine.constraints.limits import MAX_DEPTH

MAX_EXACT_INTEGER: Final = 2**53
"""Numbers beyond it are rounded by the library, which compares as binary64."""


class ConstraintTextError(ValueError):
    """A constraint is written in a way that cannot be enforced; the message says what and where."""


def read_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ConstraintTextError: If it is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ConstraintTextError(f"it is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ConstraintTextError(f"it is no JSON: {error}") from None
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ConstraintTextError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(item, dict):
            pending += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, list):
            pending += [(child, depth + 1) for child in item]
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
