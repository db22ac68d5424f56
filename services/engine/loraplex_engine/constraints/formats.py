"""The string formats of JSON Schema that are enforced, as patterns.

Those that the library has are its own, except where it allows what the format forbids, or lacks a spelling that the format
has: dates, times, and addresses. Years begin at 0001, as in Python.
"""

from __future__ import annotations

from typing import Final

LIBRARY_FORMATS: Final = frozenset({"duration", "hostname", "ipv4", "uri", "uuid"})
"""Formats that the library enforces rightly."""

INTEGER_BOUNDS: Final = {
    f"{sign}int{bits}": (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    for sign in ("", "u")
    for bits in (8, 16, 32)
}
"""OpenAPI's formats of integers -> smallest and largest value."""
NUMBER_FORMATS: Final = frozenset({*INTEGER_BOUNDS, "int64", "uint64", "float", "double"})
"""Formats that say how a number is stored; beyond 32 bits nothing is enforced but the type."""

_YEAR: Final = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR: Final = (
    "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # 0000 is none here
)
_DATE: Final = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_HOUR: Final = "(?:[01][0-9]|2[0-3])"
_FRACTION: Final = r"(?:\.[0-9]+)?"


def _leap_seconds() -> str:
    """Return the last second of 23:59 UTC in the local times of all offsets by quarters of an hour."""
    options = [rf"23:59:60{_FRACTION}[zZ]"]
    for sign, direction in ((r"\+", 1), ("-", -1)):
        for quarter in range(0, 60, 15):
            pairs = []
            for hour in range(24):
                local = (23 * 60 + 59 + direction * (hour * 60 + quarter)) % (24 * 60)
                pairs.append(f"{local // 60:02}:{local % 60:02}:60{_FRACTION}{sign}{hour:02}:{quarter:02}")
            options += pairs
    return "|".join(options)


_TIME: Final = f"(?:{_HOUR}:[0-5][0-9]:[0-5][0-9]{_FRACTION}(?:[zZ]|[+-]{_HOUR}:[0-5][0-9])|{_leap_seconds()})"  #
_BYTE: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4: Final = rf"{_BYTE}(?:\.{_BYTE}){{3}}"


def _ipv6() -> str:
    group = "[0-9a-fA-F]{1,4}"
    last = f"(?:{group}:{group}|{_IPV4})"
    options = [f"(?:{group}:){{6}}{last}"]
    # num_after groups of 16 bits follow the double colon, and at most 7 minus that many come before it.
    for num_after in range(8):
        most_before = 7 - num_after
        before = f"(?:{group}(?::{group}){{0,{most_before - 1}}})?" if most_before else ""
        if num_after == 0:
            after = ""
        elif num_after == 1:
            after = group
        else:
            after = (f"(?:{group}:){{{num_after - 2}}}" if num_after > 2 else "") + last
        options.append(f"{before}::{after}")
    return "(?:" + "|".join(options) + ")"


_IPV6: Final = _ipv6()
_ATOM: Final = r"[a-zA-Z0-9!#$%&'*+\-/=?^_`{|}~]+"
_LABEL: Final = "[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_EMAIL: Final = (
    rf'(?:{_ATOM}(?:\.{_ATOM})*|"(?:[ !#-\[\]-~]|\\[ -~])*")'
    rf"@(?:{_LABEL}(?:\.{_LABEL})*|\[(?:{_IPV4}|IPv6:{_IPV6})\])"
)

PATTERNS: Final = {
    "date": f"^{_DATE}$",
    "date-time": f"^{_DATE}[tT]{_TIME}$",
    "email": f"^{_EMAIL}$",
    "ipv6": f"^{_IPV6}$",
    "time": f"^{_TIME}$",
}
"""Format -> the pattern of ECMA 262 that replaces the library's."""

STRING_FORMATS: Final = frozenset({*LIBRARY_FORMATS, *PATTERNS})
