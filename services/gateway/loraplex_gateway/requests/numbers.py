"""Numbers of a request: as an engine gets them, and as messages show them."""

from __future__ import annotations

import math
import struct
from typing import Final

MAX_SINGLE: Final = 2.0**127
MAX_WHOLE: Final = 2.0**64


def as_sent(value: float) -> float:
    """Return a fraction as the engine will see it, in single precision: what is too small for that is 0."""
    if isinstance(value, int) or not abs(value) < MAX_SINGLE:
        return value
    return float(struct.unpack("f", struct.pack("f", value))[0])


def number(value: float) -> str:
    """Return a number as people write it: whole ones with all their digits, fractions so that they differ from their limits."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < MAX_WHOLE):
        return str(int(value))
    short = f"{value:g}"
    return short if as_sent(float(short)) == as_sent(value) or math.isnan(value) else f"{value:.9g}"
