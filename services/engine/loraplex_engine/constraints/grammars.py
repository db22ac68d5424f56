"""From what a request wants to the library's text of a grammar."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.structured_output import ConstraintKind, StructuredOutput

from loraplex_engine.constraints.context_free import read_grammar
from loraplex_engine.constraints.json_schema import prepare_schema
from loraplex_engine.constraints.json_text import ConstraintTextError, read_json
from loraplex_engine.constraints.limits import MAX_LITERAL_BYTES
from loraplex_engine.constraints.patterns import PatternError, literal, to_library
from loraplex_engine.constraints.structural_tag import read_structural_tag
from loraplex_engine.constraints.tag_grammar import NO_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.constraints.tokenizer import Vocabulary

MAX_CHOICES: Final = 1024
_NO_FORCING: Final = '%llguidance {"no_forcing": true}'
_ESCAPED: Final = re.compile(r"\\+(?:x([0-9a-f]{2})|u([0-9a-f]{4}))")  # as `patterns.literal` and JSON write signs


def to_grammar(wanted: StructuredOutput, vocabulary: Vocabulary, *, compact: bool = False) -> str:
    """Return the library's list of grammars, as JSON.

    Args:
        wanted: The constraint.
        vocabulary: The model's tokens, which structural tags name.
        compact: Whether outputs in JSON have no blanks.

    Raises:
        ConstraintTextError: If the constraint cannot be written as a grammar; the message begins with its kind.
    """
    readers: dict[ConstraintKind, Callable[[], list[dict[str, Any]]]] = {
        ConstraintKind.JSON_OBJECT: lambda: [_schema('{"type": "object"}', compact)],
        ConstraintKind.JSON_SCHEMA: lambda: [_schema(wanted.text, compact)],
        ConstraintKind.REGEX: lambda: [_lark(f"start: /{_regex(wanted.text)}/")],
        ConstraintKind.CHOICE: lambda: [_lark(f"start: /{_choice(wanted.text)}/")],
        ConstraintKind.GRAMMAR: lambda: [_lark(read_grammar(wanted.text, compact=compact))],
        ConstraintKind.STRUCTURAL_TAG: lambda: read_structural_tag(wanted.text, vocabulary, compact=compact),
    }
    try:
        grammars = readers[wanted.kind]()
    except ConstraintTextError as error:
        raise ConstraintTextError(f"{wanted.kind.value}: {error}") from None
    if _has_special_text(json.dumps(grammars, ensure_ascii=False), vocabulary):
        grammars[0] = _without_forcing(grammars[0])
    return json.dumps({"grammars": grammars})


def _has_special_text(grammars: str, vocabulary: Vocabulary) -> bool:
    """Return whether grammars may ask for the text of a special token."""
    plain = _ESCAPED.sub(lambda found: chr(int(found[1] or found[2], 16)), grammars).replace("\\", "")
    return any(text.replace("\\", "") in plain for text in vocabulary.special_tokens)


def _without_forcing(grammar: dict[str, Any]) -> dict[str, Any]:
    """Return a grammar whose text comes token by token also where only one text is possible.

    The library tokenises such a text at once, and takes the text of a special token for the token, which is no text.
    """
    rest = dict(grammar)
    schema = rest.pop("json_schema", None)
    lark = rest.pop("lark_grammar", None) if schema is None else f"start: %json {json.dumps(schema)}"
    return {**rest, "lark_grammar": f"{_NO_FORCING}\n{str(lark).removeprefix(NO_OPTIONS)}"}


def _schema(text: str, compact: bool) -> dict[str, Any]:
    return {"json_schema": prepare_schema(text, compact=compact)}


def _lark(text: str) -> dict[str, Any]:
    return {"lark_grammar": text}


def _regex(text: str) -> str:
    try:
        return to_library(text)
    except PatternError as error:
        raise ConstraintTextError(f"in {text[:80]!r} {error}") from None


def _choice(text: str) -> str:
    choices = read_json(text)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ConstraintTextError("a list of texts is needed")
    if not 0 < len(choices) <= MAX_CHOICES:
        raise ConstraintTextError(f"1 to {MAX_CHOICES} texts are needed, not {len(choices)}")
    if any(len(choice.encode("utf-8", "surrogatepass")) > MAX_LITERAL_BYTES for choice in choices):
        raise ConstraintTextError(f"a text is longer than {MAX_LITERAL_BYTES} bytes")
    try:
        return "|".join(map(literal, choices))
    except PatternError as error:
        raise ConstraintTextError(str(error)) from None
