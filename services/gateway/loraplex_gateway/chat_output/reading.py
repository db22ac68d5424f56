"""How the output of one request is read, settled when its prompt is rendered: parser, constraint, special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind, StructuredOutput

from loraplex_gateway.chat_output import grammar
from loraplex_gateway.chat_output.formats import PLAIN, OutputFormat, ToolFormat
from loraplex_gateway.chat_output.parser import OutputParser, ParserRules
from loraplex_gateway.chat_output.thoughts import Thinking, thinking_of
from loraplex_gateway.types import ToolMode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_gateway.chat_output.deltas import ChatParser
    from loraplex_gateway.chat_output.grammar import Thoughts, TokenId
    from loraplex_gateway.types import ChatPrompt, OutputParsing

_NO_TEXT = {"type": "object"}
UNKNOWN_FORMAT = (
    "the model's chat template writes calls of functions in a way that is not parsed here; force a call with tool_choice "
    '"required" or a function\'s name, or leave tools out'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatReading:
    """How one output is read.

    Attributes:
        rules: What parsers of it look for; None if all of it is content.
        shown_ids: Special tokens that parsers have to see.
        structured_output: What the output must look like, thoughts and calls included; None for anything.
        thought_end_id: The token that ends the thoughts, if it begins with them.
    """

    rules: ParserRules | None
    shown_ids: frozenset[int] = frozenset()
    structured_output: StructuredOutput | None = None
    thought_end_id: int | None = None

    def parser(self) -> ChatParser:
        """Return a parser for one choice."""
        assert self.rules is not None
        return OutputParser(self.rules)


def chat_reading(
    prompt: ChatPrompt,
    parsing: OutputParsing,
    *,
    output: OutputFormat,
    rendered: str,
    token_id: TokenId,
    base_token_id: TokenId | None = None,
    constraint: StructuredOutput | None = None,
) -> ChatReading:
    """Return how the output of a chat is read.

    Args:
        prompt: The conversation, with the functions that are offered.
        parsing: What the client wants.
        output: How the template's model writes.
        rendered: The prompt after the template.
        token_id: Finds tokens that are a marker of the format.
        base_token_id: Finds the base model's tokens only, where an adapter adds some: engines compile constraints for the
            base's vocabulary, so markers that are added tokens are spelt there. None: as `token_id`.
        constraint: What the client wants the content to look like.

    Raises:
        InvalidParameterError: If the template's way to call functions is not known, or calls and constraint do not go together.
    """
    mode = parsing.tool_mode if prompt.tools else ToolMode.NONE
    tools = _tool_format(output, mode)
    tags, thinking = output.thoughts, thinking_of(prompt, rendered, output.thoughts)
    thoughts = grammar.Thoughts(thinking=thinking, tags=tags, token_id=base_token_id or token_id, any_token_id=token_id)
    if tools is not None:
        constraint = tool_constraint(
            prompt.tools, mode, fmt=tools, is_parallel=parsing.is_parallel, thoughts=thoughts, content=constraint
        )
    elif constraint is not None:
        constraint = grammar.after_thoughts(constraint, thoughts)
    thinks = tags is not None and thinking is not Thinking.NONE
    rules = ParserRules(
        thoughts=tags if thinks else None,
        starts_in_thought=thinking is Thinking.OPEN,
        tools=tools,
        schemas={function["name"]: grammar.parameters_of(function) for function in prompt.tools},
        is_parallel=parsing.is_parallel,
        is_forced=tools is not None and mode is ToolMode.REQUIRED,
    )
    markers = (
        *(tools.markers if tools else ()),
        *((tags.opening, tags.closing) if tags is not None and thinks else ()),
    )
    return ChatReading(
        rules=rules if thinks or tools else None,
        shown_ids=frozenset(found for text in markers if (found := token_id(text)) is not None),
        structured_output=constraint,
        thought_end_id=thoughts.end_id if thinks else None,
    )


def _tool_format(output: OutputFormat, mode: ToolMode) -> ToolFormat | None:
    if mode is ToolMode.NONE:
        return None
    if output.refusal:
        raise InvalidParameterError(f"tools are not possible here: {output.refusal}; leave them out", field="tools")
    if output.tools is not None:
        return output.tools
    if mode is ToolMode.REQUIRED:
        return PLAIN
    raise InvalidParameterError(UNKNOWN_FORMAT, field="tools")


def tool_constraint(
    functions: Sequence[Mapping[str, Any]],
    mode: ToolMode,
    *,
    fmt: ToolFormat,
    is_parallel: bool,
    thoughts: Thoughts,
    content: StructuredOutput | None = None,
) -> StructuredOutput | None:
    """Return what an output with functions must look like; None where the model is free.

    A call that must be made is one of `functions`, with arguments of its schema. One that may be made is so if any function
    is strict, those of the others being any object; the text around it is free, or `content`.

    Raises:
        InvalidParameterError: If `content` is no JSON: nothing tells such text and calls apart.
    """
    token_id = thoughts.token_id
    if mode is ToolMode.REQUIRED:
        rules = grammar.call_rules(fmt, functions, token_id) + grammar.calls_rule(
            fmt, token_id, is_parallel=is_parallel
        )
        return grammar.constrained("calls", rules, thoughts)
    loose = [function if function.get("strict") else {**function, "parameters": _NO_TEXT} for function in functions]
    rules = grammar.call_rules(fmt, loose, token_id) + grammar.calls_rule(fmt, token_id, is_parallel=is_parallel)
    if content is not None:
        body = grammar.body_of(content)
        if body is None or content.kind not in (ConstraintKind.JSON_OBJECT, ConstraintKind.JSON_SCHEMA):
            raise InvalidParameterError(
                f"a {content.kind.value} is not possible beside tools that the model may call; ask for JSON, or for "
                'tool_choice "none" or "required"',
                field="structured_output",
            )
        return grammar.constrained(f"(calls | {body[0]})", rules + body[1], thoughts)
    if not any(function.get("strict") for function in functions):
        return None
    return grammar.constrained(
        "free", rules + grammar.free_text_rules(fmt, token_id, is_parallel=is_parallel), thoughts
    )
