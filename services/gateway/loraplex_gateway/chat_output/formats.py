"""How a chat template's model writes thoughts and calls of functions: one table, looked up by the template's text."""

from __future__ import annotations

import enum
import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


class Syntax(enum.Enum):
    """How calls are written behind what opens them."""

    JSON = "an object with the name and the arguments, or a list of them"
    XML = "<function=NAME> with a <parameter=KEY> for each argument"
    NAMED = "the name, a marker, and the object of the arguments"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
    """One way to write calls.

    Attributes:
        name: As vLLM calls its parser, where it has one.
        syntax: What is behind `opening`.
        opening: What begins a call in the text; empty: calls are all of the output, from its first character on.
        closing: What ends a call; empty for nothing.
        arguments_key: Name of the arguments' member in a call's object.
        is_list: Whether several calls are one list.
        separator: What is between two calls that are no list.
        middle: What is between name and arguments (`NAMED`).
        may_open: Something that may stand before calls that are all of the output.
        id_length: Characters of a call's id, letters and digits; 0 for ids as OpenAI has them.
    """

    name: str
    syntax: Syntax
    opening: str
    closing: str = ""
    arguments_key: str = "arguments"
    is_list: bool = False
    separator: str = "\n"
    middle: str = ""
    may_open: str = ""
    id_length: int = 0

    @property
    def openings(self) -> tuple[str, ...]:
        """Everything that begins a call within text."""
        more = "<function=" if self.syntax is Syntax.XML else self.may_open
        return tuple(text for text in (self.opening, more) if text)

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that a tokenizer may have as one token."""
        return tuple(text for text in (self.opening, self.closing, self.middle, self.may_open, *_INNER) if text)


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """What begins and ends the thoughts."""

    opening: str
    closing: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFormat:
    """How one template's model writes.

    Attributes:
        tools: How it calls functions; None if that is not known.
        thoughts: How it thinks; None if it does not.
        refusal: Why functions cannot be offered to it at all; empty if they can.
    """

    tools: ToolFormat | None
    thoughts: ThoughtTags | None
    refusal: str = ""


_INNER: Final = ("[CALL_ID]", "[ARGS]")
HERMES: Final = ToolFormat(name="hermes", syntax=Syntax.JSON, opening="<tool_call>", closing="</tool_call>")
QWEN3_CODER: Final = ToolFormat(name="qwen3_coder", syntax=Syntax.XML, opening="<tool_call>", closing="</tool_call>")
LLAMA3_JSON: Final = ToolFormat(
    name="llama3_json",
    syntax=Syntax.JSON,
    opening="",
    arguments_key="parameters",
    separator="; ",
    may_open="<|python_tag|>",
)
MISTRAL: Final = ToolFormat(name="mistral", syntax=Syntax.JSON, opening="[TOOL_CALLS]", is_list=True, id_length=9)
MISTRAL_NAMED: Final = ToolFormat(
    name="mistral", syntax=Syntax.NAMED, opening="[TOOL_CALLS]", separator="", middle="[ARGS]", id_length=9
)
GRANITE: Final = ToolFormat(name="granite", syntax=Syntax.JSON, opening="<|tool_call|>", is_list=True)
PHI4_MINI: Final = ToolFormat(
    name="phi4_mini_json", syntax=Syntax.JSON, opening="<|tool_call|>", closing="<|/tool_call|>", is_list=True
)
PLAIN: Final = ToolFormat(name="json", syntax=Syntax.JSON, opening="", is_list=True)
"""For a forced choice where the template's own format is not known, as vLLM has it."""

# (texts that a template must all have, its format); the first that fits.
_BY_TEXT: Final[tuple[tuple[tuple[str, ...], ToolFormat | None], ...]] = (
    (("<function=", "<parameter="), QWEN3_CODER),
    (("<arg_key>",), None),  # GLM's
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_NAMED),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<tool_call>",), HERMES),
    (("<|tool_call|>", "<|/tool_call|>"), PHI4_MINI),
    (("<|tool_call|>",), GRANITE),
    (("<|python_tag|>",), LLAMA3_JSON),
    (('"name"', '"parameters"', "<|start_header_id|>"), LLAMA3_JSON),
    (('"name": function name, "parameters"',), LLAMA3_JSON),
)
_THOUGHTS: Final = (
    ThoughtTags("<think>", "</think>"),
    ThoughtTags("[THINK]", "[/THINK]"),
    ThoughtTags("<seed:think>", "</seed:think>"),
    ThoughtTags("<|START_THINKING|>", "<|END_THINKING|>"),
)
_THOUGHT_FIELDS: Final = ("reasoning_content", "reasoning", "thinking")
HARMONY: Final = ("<|channel|>", "<|message|>")
_NO_HARMONY: Final = "the model writes in gpt-oss's harmony format, whose calls are not parsed here"


@functools.lru_cache(maxsize=1024)
def output_format(source: str, *, reads_tools: bool, response_template: str = "") -> OutputFormat:
    """Return how the model of a chat template writes.

    Args:
        source: The template's Jinja.
        reads_tools: Whether it has a use for `tools`; else functions are rendered as Hermes' models know them.
        response_template: JSON of the tokenizer's `response_template` (or older `response_schema`); empty if it has none.
    """
    spec = _spec(response_template)
    known = source + response_template.replace('\\"', '"').replace("\\/", "/")
    thoughts = _thoughts_of(spec) or next((tags for tags in _THOUGHTS if tags.closing in known), None)
    if all(text in known for text in HARMONY):
        return OutputFormat(tools=None, thoughts=None, refusal=_NO_HARMONY)
    if not reads_tools:
        return OutputFormat(tools=HERMES, thoughts=thoughts)
    tools = _tools_of(spec) or next((fmt for texts, fmt in _BY_TEXT if all(text in known for text in texts)), None)
    return OutputFormat(tools=tools, thoughts=thoughts)


def _spec(response_template: str) -> Mapping[str, Any]:
    """Return the fields of transformers' `response_template`, each a region of the text; none of the older schema."""
    described = json.loads(response_template) if response_template else None
    fields = described.get("fields") if isinstance(described, dict) else None
    return fields if isinstance(fields, dict) else {}


def _thoughts_of(fields: Mapping[str, Any]) -> ThoughtTags | None:
    for name in _THOUGHT_FIELDS:
        field = fields.get(name)
        if isinstance(field, dict) and (ends := _literals(field)) is not None and all(ends):
            return ThoughtTags(*ends)
    return None


def _tools_of(fields: Mapping[str, Any]) -> ToolFormat | None:
    """Return the format of a region that holds the JSON of calls; None for others, which the table may know."""
    field = fields.get("tool_calls")
    if not isinstance(field, dict) or field.get("content") != "json" or field.get("content_args"):
        return None
    ends = _literals(field)
    if ends is None or not ends[0]:
        return None
    key = "parameters" if "parameters" in json.dumps(field.get("transform", "")) else "arguments"
    formats = (fmt for _, fmt in _BY_TEXT if fmt is not None and fmt.syntax is Syntax.JSON)
    known = next((fmt for fmt in formats if (fmt.opening, fmt.closing) == ends), None)
    return known or ToolFormat(
        name="response_template", syntax=Syntax.JSON, opening=ends[0], closing=ends[1], arguments_key=key
    )


def _literals(field: Mapping[str, Any]) -> tuple[str, str] | None:
    ends = []
    for name in ("open", "close"):
        value = field.get(name, "")
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, str):
            return None
        ends.append(value.strip())
    return ends[0], ends[1]
