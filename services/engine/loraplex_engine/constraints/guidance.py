"""Reads the library's `x-guidance`, with which a schema says what form its JSON has.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from loraplex_engine.constraints.json_text import ConstraintTextError
from loraplex_engine.constraints.limits import MAX_JSON_BLANKS

ESCAPES: Final = 'nrbtf\\"'
"""What may follow a backslash in an output's strings; without ``u`` each name of a property has one spelling only."""
BLANK: Final = "[\\x20\\n\\r\\t]"
_QUANTIFIER: Final = r"(?P<quantifier>[?*+]|\{\d{1,3}(?:,\d{0,3})?\})?"
_ONE_BLANK: Final = r"(?: |\\s|\\t|\\n|\\r|\\x20|\\x09|\\x0[aAdD])"
_BLANKS: Final = re.compile(rf"(?P<blank>\[{_ONE_BLANK}+\]|{_ONE_BLANK}){_QUANTIFIER}")
_SEPARATORS: Final = {"item_separator": ",", "key_separator": ":"}
_FLAGS: Final = ("whitespace_flexible", "coerce_one_of", "lenient", "json_allow_general_unicode_escapes")
_KNOWN: Final = (*_FLAGS, "whitespace_pattern", *_SEPARATORS, "json_allowed_escapes")


@dataclass(frozen=True, slots=True)
class Guidance:
    """What a schema says of its outputs' form.

    Attributes:
        form: The library's options.
        coerces_one_of: Whether oneOf means anyOf.
    """

    form: dict[str, Any]
    coerces_one_of: bool


def read_guidance(options: Any, *, compact: bool) -> Guidance:
    """Return what `x-guidance` asks for.

    Args:
        options: Its value; an empty object if it is not there.
        compact: Whether outputs have no blanks, whatever the schema says.

    Raises:
        ConstraintTextError: For what is no such option, or would let an output be no JSON or not fit the schema.
    """
    if not isinstance(options, dict):
        raise _refused("it must have an object")
    for name, value in options.items():
        if name not in _KNOWN:
            raise _refused(f"{name!r} is not known; known are {', '.join(_KNOWN)}")
        if name in _FLAGS and not isinstance(value, bool):
            raise _refused(f"{name} is true or false")
        if name not in _FLAGS and not isinstance(value, str):
            raise _refused(f"{name} is a text")
    if options.get("lenient"):
        raise _refused("lenient would let keywords be ignored; leave the keywords out that need not hold")
    escapes = options.get("json_allowed_escapes", ESCAPES)
    if options.get("json_allow_general_unicode_escapes") or set(escapes) != set(ESCAPES):
        raise _refused(
            f"the escapes of outputs are those of {ESCAPES!r}: with \\u a name could be spelt around its schema"
        )
    return Guidance(_form(options, compact=compact), bool(options.get("coerce_one_of")))


def _form(options: dict[str, Any], *, compact: bool) -> dict[str, Any]:
    form: dict[str, Any] = {"json_allowed_escapes": ESCAPES}
    if compact:
        return form | {"whitespace_flexible": False}
    if "whitespace_pattern" in options:
        form["whitespace_pattern"] = _blanks(options["whitespace_pattern"], "whitespace_pattern")
    elif options.get("whitespace_flexible", True):
        form["whitespace_pattern"] = f"{BLANK}{{1,{MAX_JSON_BLANKS}}}"
    else:
        form["whitespace_flexible"] = False
    for name, mark in _SEPARATORS.items():
        if name in options:
            parts = re.fullmatch(rf"((?:\{{[^}}]*\}}|[^{mark}{{])*){mark}(.*)", options[name], re.DOTALL)
            if parts is None:
                raise _refused(f"{name} must have one {mark!r} and blanks around it, or outputs would be no JSON")
            form[name] = _blanks(parts[1], name) + mark + _blanks(parts[2], name)
    return form


def _blanks(pattern: str, name: str) -> str:
    r"""Return a pattern of blanks in the library's dialect; ``\s`` stands for those of JSON, and none goes on for ever."""
    parts, at = [], 0
    while at < len(pattern):
        found = _BLANKS.match(pattern, at)
        if found is None:
            raise _refused(
                f"{name} is made of blanks, \\s, \\t, \\n, \\r and classes of them, with ?, *, + or {{m,n}}; other "
                "texts would be no JSON"
            )
        blank = found["blank"].replace(" ", "\\x20").replace("\\s", "\\x20\\n\\r\\t")
        parts += [blank if blank.startswith("[") else f"[{blank}]", _bounded(found["quantifier"] or "{1}", name)]
        at = found.end()
    return "".join(parts)


def _bounded(quantifier: str, name: str) -> str:
    low, comma, high = {"?": "0,1", "*": "0,", "+": "1,"}.get(quantifier, quantifier.strip("{}")).partition(",")
    most = int(high) if high else max(int(low), MAX_JSON_BLANKS) if comma else int(low)
    if most < int(low):
        raise _refused(f"{name} has a repetition of {low} to {most}")
    return f"{{{low},{most}}}"


def _refused(reason: str) -> ConstraintTextError:
    return ConstraintTextError(f"keyword 'x-guidance': {reason}")
