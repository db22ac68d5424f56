"""The fields of each format of structural tags: which there are, of which type, and what they are if left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_engine.constraints.json_text import ConstraintTextError

if TYPE_CHECKING:
    from collections.abc import Callable

_NEEDED: Final = object()
_TEXTS: Final = "a list of texts"
_TOKEN: Final = "a token's id or text"
_TOKENS: Final = "a list of tokens' ids or texts"
_COUNT: Final = "a whole number from 0 on"
_FORMATS: Final = "a list of formats, at least one"
_RULES: Final = "a list of pairs, at least one"

FIELDS: Final[dict[str, dict[str, tuple[Any, str]]]] = {
    "any_text": {"excludes": ([], _TEXTS), "max_chars": (None, _COUNT)},
    "any_tokens": {"exclude_tokens": ([], _TOKENS), "max_tokens": (None, _COUNT)},
    "const_string": {"value": (_NEEDED, "a text")},
    "dispatch": {"rules": (_NEEDED, _RULES), "loop": (True, "true or false"), "excludes": ([], _TEXTS)},
    "exclude_token": {"exclude_tokens": ([], _TOKENS)},
    "grammar": {"grammar": (_NEEDED, "a text")},
    "json_schema": {
        "json_schema": (_NEEDED, "a schema"),
        "style": ("json", "a text"),
        "any_order": (False, "true or false"),
        "max_whitespace_cnt": (None, _COUNT),
    },
    "optional": {"content": (_NEEDED, "a format")},
    "or": {"elements": (_NEEDED, _FORMATS)},
    "plus": {"content": (_NEEDED, "a format")},
    "regex": {"pattern": (_NEEDED, "a text")},
    "repeat": {"min": (_NEEDED, _COUNT), "max": (_NEEDED, "a whole number, or -1"), "content": (_NEEDED, "a format")},
    "sequence": {"elements": (_NEEDED, _FORMATS)},
    "star": {"content": (_NEEDED, "a format")},
    "tag": {
        "begin": (_NEEDED, "a text or a token format"),
        "content": (_NEEDED, "a format"),
        "end": (_NEEDED, "a text, a list of texts, or a token format"),
    },
    "tags_with_separator": {
        "tags": (_NEEDED, _FORMATS),
        "separator": (_NEEDED, "a text"),
        "at_least_one": (False, "true or false"),
        "stop_after_first": (False, "true or false"),
    },
    "token": {"token": (_NEEDED, _TOKEN)},
    "token_dispatch": {"rules": (_NEEDED, _RULES), "loop": (True, "true or false"), "exclude_tokens": ([], _TOKENS)},
    "token_triggered_tags": {
        "trigger_tokens": (_NEEDED, _TOKENS),
        "tags": (_NEEDED, _FORMATS),
        "exclude_tokens": ([], _TOKENS),
        "at_least_one": (False, "true or false"),
        "stop_after_first": (False, "true or false"),
    },
    "triggered_tags": {
        "triggers": (_NEEDED, _TEXTS),
        "tags": (_NEEDED, _FORMATS),
        "at_least_one": (False, "true or false"),
        "stop_after_first": (False, "true or false"),
        "excludes": ([], _TEXTS),
    },
}
"""Format -> its fields -> (what they are if left out, what they must have)."""


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_token(value: Any) -> bool:
    return _is_count(value) or isinstance(value, str)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_token(value[0]) and isinstance(value[1], dict)


_CHECKS: Final[dict[str, Callable[[Any], bool]]] = {
    "a text": lambda value: isinstance(value, str),
    "a format": lambda value: isinstance(value, dict),
    "a schema": lambda value: isinstance(value, dict | bool | str),
    "true or false": lambda value: isinstance(value, bool),
    "a text or a token format": lambda value: isinstance(value, dict) or (isinstance(value, str) and value != ""),
    "a text, a list of texts, or a token format": lambda value: (
        isinstance(value, str | dict) or (_is_texts(value) and value != [])
    ),
    "a whole number, or -1": lambda value: _is_count(value, -1),
    _COUNT: lambda value: value is None or _is_count(value),
    _TEXTS: _is_texts,
    _TOKEN: _is_token,
    _TOKENS: lambda value: isinstance(value, list) and all(map(_is_token, value)),
    _FORMATS: lambda value: isinstance(value, list) and value != [] and all(isinstance(item, dict) for item in value),
    _RULES: lambda value: isinstance(value, list) and value != [] and all(map(_is_pair, value)),
}


def read_fields(fmt: Any, expected: str | None = None) -> dict[str, Any]:
    """Return the fields of a format, those that are left out too.

    Args:
        fmt: The format's JSON.
        expected: The only type that may be there, if it must be a certain one.

    Raises:
        ConstraintTextError: If the format or one of its fields is not known, or has another type.
    """
    kind = fmt.get("type", expected) if isinstance(fmt, dict) else None
    if kind not in FIELDS or (expected and kind != expected):
        known = expected or ", ".join(sorted(FIELDS))
        raise ConstraintTextError(f"the format {kind!r} cannot be enforced; it may be {known}")
    known_fields = FIELDS[kind]
    given = {key: value for key, value in fmt.items() if key != "type"}
    if unknown := set(given) - set(known_fields):
        raise ConstraintTextError(f"the field {min(unknown)!r} of {kind} cannot be enforced")
    fields = {key: default for key, (default, _) in known_fields.items() if default is not _NEEDED} | given
    for key, (_, needed) in known_fields.items():
        if key not in fields:
            raise ConstraintTextError(f"{kind} lacks {key!r}")
        if not _CHECKS[needed](fields[key]):
            raise ConstraintTextError(f"the field {key!r} of {kind} must have {needed}")
    return fields
