"""Context-free grammars, in the notation of Lark or in llama.cpp's GBNF, as the library reads them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

from llguidance.gbnf_to_lark import gbnf_to_lark

from loraplex_engine.constraints.json_schema import prepare_schema
from loraplex_engine.constraints.json_text import ConstraintTextError

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMMENT: Final = re.compile(r"(#|//).*$")
_UNICODE_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))|\\.", re.DOTALL)
_JSON_BLOCK: Final = re.compile(r"%json\s*(?=\{)")
_HEAD_OF_RULE: Final = re.compile(r"^[ \t]*[?!]?([A-Za-z_]\w*)[^\n:]*:", re.MULTILINE)
_OPTIONS_OF_RULE: Final = re.compile(r"^\s*[\w-]+\s*\[([^\]]*)\]\s*:", re.MULTILINE)
_REFUSED_OPTIONS: Final = {
    "capture": "outputs have no captures",
    "max_tokens": "bound the output with max_tokens of the request, or the rule with {m,n}",
    "stop": "write suffix, which takes nothing back",
    "stop_capture": "outputs have no captures",
    "temperature": "set the temperature of the request",
}


def read_grammar(text: str, *, compact: bool = False) -> str:
    """Return a grammar in the library's variant of Lark.

    A grammar with ``::=`` is taken for GBNF, any other for Lark, as vLLM does. Lark's ``%json`` holds a JSON Schema, which
    is read as any other.

    Args:
        text: The grammar.
        compact: Whether JSON within it has no blanks.

    Raises:
        ConstraintTextError: If it is neither, or asks for what outputs do not have.
    """
    if not text.strip():
        raise ConstraintTextError("a grammar must have rules")
    if any("::=" in _COMMENT.sub("", line) for line in text.split("\n")):
        return _from_gbnf(text)
    for options in _OPTIONS_OF_RULE.findall(text):
        for option in re.findall(r"[a-z_]+(?=\s*(?:[=,]|$))", options):
            if option in _REFUSED_OPTIONS:
                raise ConstraintTextError(f"the rule option {option!r} is not served: {_REFUSED_OPTIONS[option]}")
    if re.search(r'"allow_invalid_utf8"\s*:\s*true', text):
        raise ConstraintTextError("the option 'allow_invalid_utf8' is not served: outputs are text")
    return _prepare_schemas(text, compact)


def schemas_of(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the schemas of a Lark grammar: the name of the rule that each is in, and where in the text it is, half-open."""
    done = 0
    for found in _JSON_BLOCK.finditer(text):
        if found.start() < done:
            continue
        try:
            _, end = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError):
            continue  # the library says what is wrong with it
        *_, rule = ["", *_HEAD_OF_RULE.findall(text, done, found.start())]
        yield rule, found.end(), end
        done = end


def _prepare_schemas(text: str, compact: bool) -> str:
    """Replace the schemas of %json by those that the library shall read."""
    parts, done = [], 0
    for rule, start, end in schemas_of(text):
        try:
            schema = prepare_schema(text[start:end], compact=compact)
        except ConstraintTextError as error:
            raise ConstraintTextError(f"rule {rule!r}: {error}") from None
        parts += [text[done:start], json.dumps(schema)]
        done = end
    return "".join([*parts, text[done:]])


def _from_gbnf(text: str) -> str:
    try:
        return str(gbnf_to_lark(_UNICODE_ESCAPE.sub(_character, text)))
    except RecursionError:
        raise ConstraintTextError("the grammar is nested too deeply") from None
    except Exception as error:  # the converter raises Exception itself
        raise ConstraintTextError(f"the grammar is no GBNF: {error}") from error


def _character(escape: re.Match[str]) -> str:
    """Return the character of an escape, which the converter would write in a way that the library cannot read."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise ConstraintTextError(f"the grammar has {escape[0]}, which is no character")
    char = chr(code)
    return f"\\x{code:02x}" if code < 0x80 and not char.isalnum() else char
