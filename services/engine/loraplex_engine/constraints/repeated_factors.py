"""Keeps the library's arithmetic on multipleOf within the 32 bits that it computes in."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Final

from loraplex_engine.constraints.json_text import ConstraintTextError

MAX_PRODUCT: Final = 2**32 - 1


def check_factors(factors: set[float], *, may_meet: bool) -> None:
    """Check the values of multipleOf of a schema.

    Args:
        factors: The values.
        may_meet: Whether any of them may meet in one place, through allOf or $ref.

    Raises:
        ConstraintTextError: If a product of them does not fit, so that the library would compute a wrong common multiple.
    """
    exact = [Decimal(repr(factor)) for factor in factors if factor]
    if len(exact) < len(factors):
        raise ConstraintTextError("keyword 'multipleOf' must have a number above 0")
    for group in [exact] if may_meet else [[factor] for factor in exact]:
        _check_together(group)


def _check_together(exact: list[Decimal]) -> None:
    if not exact:
        return
    places = max(0, *(-int(factor.as_tuple().exponent) for factor in exact))
    whole = [int(factor.scaleb(places)) for factor in exact]
    product = math.lcm(*whole) * (max(whole) if len(whole) > 1 else 1)
    if product > MAX_PRODUCT:
        raise ConstraintTextError(
            f"keyword 'multipleOf' cannot be enforced: the common multiple of {len(whole)} values is too large"
        )
