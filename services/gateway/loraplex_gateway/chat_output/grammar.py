"""Writes constraints in llguidance's dialect of Lark: calls, what may come before them, and what may come instead.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind, StructuredOutput

from loraplex_gateway.chat_output.formats import Syntax, ThoughtTags
from loraplex_gateway.chat_output.thoughts import Thinking

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_gateway.chat_output.formats import ToolFormat

MAX_CALLS: Final = 16
"""A constrained output makes at most so many calls: a small model that repeats itself would fill its context."""
TEXT_RULES: Final = "TEXT: /(.|\\n)*/\nSPACE: /[ \\t\\r\\n]*/\n"
_SLASH: Final = re.compile(r"\\.|/", re.DOTALL)

TokenId = Callable[[str], int | None]
"""Returns the id of the token that a text is as a whole; None if it is several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thoughts:
    """What may come before the part that is constrained.

    Attributes:
        thinking: Whether the output begins with them.
        tags: What begins and ends them; None for a model that has none.
        token_id: Finds tokens that a grammar may have.
        any_token_id: Finds tokens in front of what is constrained: an adapter's added ones, too.
    """

    thinking: Thinking
    tags: ThoughtTags | None
    token_id: TokenId
    any_token_id: TokenId

    @property
    def end_id(self) -> int | None:
        """The token that ends them, if one token does."""
        return self.any_token_id(self.tags.closing) if self.tags is not None else None


def literal(text: str) -> str:
    """Return a text in Lark's quotes; nothing for none."""
    return schema_text(text) if text else ""


def schema_text(value: Any) -> str:
    """Return JSON in which nothing looks like llama.cpp's notation, by which engines tell grammars of that kind."""
    return json.dumps(value, ensure_ascii=False).replace("::=", "\\u003a\\u003a=")


def marker(text: str, token_id: TokenId) -> str:
    """Return a marker of a format as its token, which letters cannot spell, or as its letters if it is none."""
    if not text:
        return ""
    known = token_id(text)
    return literal(text) if known is None else f"<[{known}]>"


def call_rules(fmt: ToolFormat, functions: Sequence[Mapping[str, Any]], token_id: TokenId) -> str:
    """Return rules of which `one` is one call without what opens it, behind which comes nothing more of it."""
    key, lines = fmt.arguments_key, []
    closing = marker(fmt.closing, token_id)
    for n, function in enumerate(functions):
        name = function["name"]
        lines.append(f"args_{n}: %json {schema_text(parameters_of(function))}")
        if fmt.syntax is Syntax.NAMED:
            lines.append(f"one_{n}: {literal(name)} {marker(fmt.middle, token_id)} args_{n}")
            continue
        head, tail = f'{{"name": {json.dumps(name)}, "{key}": ', "}"
        if fmt.is_list or not fmt.opening:
            lines.append(f"one_{n}: {literal(head)} args_{n} {literal(tail)}")
        else:
            lines.append(f"one_{n}: {literal(chr(10) + head)} args_{n} {literal(tail + chr(10))} {closing}")
    lines.append("one: " + " | ".join(f"one_{n}" for n in range(len(functions))))
    return "\n".join(lines) + "\n"


def calls_rule(fmt: ToolFormat, token_id: TokenId, *, is_parallel: bool) -> str:
    """Return the rule of an output's calls, one or more of `one`, from what opens the first on."""
    opening = marker(fmt.opening, token_id)
    more = MAX_CALLS - 1 if is_parallel else 0
    if fmt.is_list:
        rest = f'(", " one){{0,{more}}}' if more else ""
        return f'calls: {opening} "[" one {rest} "]" {marker(fmt.closing, token_id)}\n'
    rest = f"({literal(fmt.separator)} {opening} one){{0,{more}}}" if more else ""
    return f"calls: {opening} one {rest}\n"


def free_text_rules(fmt: ToolFormat, token_id: TokenId, *, is_parallel: bool) -> str:
    """Return the rule of free text in which each call is one of `calls`' own form."""
    if not fmt.opening:
        head = marker(fmt.may_open, token_id)
        optional = f"({head})? " if head else ""
        return f"free: {optional}calls | WORDS?\nWORDS: /[ \\t\\r\\n]*[^{{\\[ \\t\\r\\n](.|\\n)*/\n"
    behind = '"[" one (", " one)* "]" ' + marker(fmt.closing, token_id) if fmt.is_list else "one"
    if (known := token_id(fmt.opening)) is not None:
        head = f"head: TEXT <[{known}]>\n"
    else:
        head = f"head[lazy]: TEXT {literal(fmt.opening)}\n"
    return f"{head}free: {f'(head {behind})* TEXT' if is_parallel else f'head {behind} | TEXT'}\n"


def parameters_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a function's arguments: an object, an empty one without parameters."""
    parameters = function.get("parameters")
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return parameters if "type" in parameters else {"type": "object", **parameters}


def constrained(body: str, rules: str, thoughts: Thoughts) -> StructuredOutput:
    """Return a grammar that holds behind the thoughts.

    Args:
        body: What comes then, in Lark.
        rules: The rules that it names.
        thoughts: Whether there may be any.
    """
    start, starts_after = body, tuple[int, ...]()
    tags, end_id = thoughts.tags, thoughts.end_id
    if tags is not None and thoughts.thinking is Thinking.OPEN:
        if end_id is not None:
            start, starts_after = f"SPACE {body}", (end_id,)
        else:
            start = f"thought SPACE {body}"
            rules += f"thought[lazy]: TEXT {literal(tags.closing)}\n"
    elif tags is not None and thoughts.thinking is Thinking.POSSIBLE:
        start, rules = f"(thought SPACE)? {body}", rules + _whole_thought(tags, thoughts.token_id)
    text = f"start: {start}\n{rules}{TEXT_RULES}"
    return StructuredOutput(kind=ConstraintKind.GRAMMAR, text=text, starts_after=starts_after)


def _whole_thought(tags: ThoughtTags, token_id: TokenId) -> str:
    opening, end_id = marker(tags.opening, token_id), token_id(tags.closing)
    if end_id is not None:
        return f"thought: {opening} TEXT <[{end_id}]>\n"
    if token_id(tags.opening) is None:
        return f"thought[lazy]: {opening} TEXT {literal(tags.closing)}\n"
    return f"thought: {opening} thought_end\nthought_end[lazy]: TEXT {literal(tags.closing)}\n"


def after_thoughts(constraint: StructuredOutput, thoughts: Thoughts) -> StructuredOutput:
    """Return a constraint that holds for what comes behind the thoughts, if the output has any.

    An output that may think or not is constrained either way, but for grammars and structural tags of the client's own:
    they wait for the end of the thoughts, as they do in vLLM.
    """
    if thoughts.tags is None or thoughts.thinking is Thinking.NONE or constraint.starts_after:
        return constraint
    end_id = thoughts.end_id
    body = body_of(constraint)
    if end_id is not None and (thoughts.thinking is Thinking.OPEN or body is None):
        return replace(constraint, starts_after=(end_id,))
    if body is None:
        raise InvalidParameterError(
            f"a {constraint.kind.value} is not possible here: the model may think first, and what ends its thoughts, "
            f"{thoughts.tags.closing}, is no token of its own; send a JSON schema, a regex or a choice",
            field="structured_output",
        )
    return constrained(body[0], body[1], thoughts)


def body_of(constraint: StructuredOutput) -> tuple[str, str] | None:
    """Return a constraint as (start, rules) of a grammar; None for those that are no part of one."""
    kind, text = constraint.kind, constraint.text
    if kind is ConstraintKind.JSON_OBJECT:
        return "body", 'body: %json {"type": "object"}\n'
    if kind is ConstraintKind.JSON_SCHEMA:
        schema = json.loads(text)
        schema = schema if isinstance(schema, dict) else {} if schema else {"not": {}}
        return "body", f"body: %json {schema_text(schema)}\n"
    if kind is ConstraintKind.CHOICE:
        return "body", f"body: {' | '.join(literal(choice) for choice in json.loads(text))}\n"
    if kind is ConstraintKind.REGEX:
        escaped = _SLASH.sub(lambda match: "\\/" if match[0] == "/" else match[0], text).replace("\n", "\\n")
        return "BODY", f"BODY: /{escaped}/\n"
    return None
