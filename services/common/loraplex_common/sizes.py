"""Sizes in bytes in the form that people write."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_PATTERN: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes of ``512MiB``, ``1.5 GB`` or ``4096``; units of 1024 have an i.

    Raises:
        ValueError: If the text is not a size.
    """
    match = _PATTERN.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no size: write bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    whole, _, fraction = match[1].partition(".")
    # Computed in integers: 0.1 GB is exactly 100,000,000 bytes.
    return int(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)


def format_size(num_bytes: int) -> str:
    """Return a size in the form for people: ``512 MiB``, ``1.5 GiB``."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def size_as_flag(num_bytes: int) -> str:
    """Return a size as flags take it, to the byte, in the largest unit that has a whole number: ``512MiB``, ``1500``."""
    value, units = num_bytes, ["KiB", "MiB", "GiB", "TiB"]
    unit = ""
    while value and value % 1024 == 0 and units:
        value, unit = value // 1024, units.pop(0)
    return f"{value}{unit}"
