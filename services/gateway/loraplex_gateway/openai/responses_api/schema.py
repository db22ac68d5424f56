"""Bodies of POST /v1/responses: the fields that `fields` calls served, with their types."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from loraplex_gateway.openai.objects import Kind, Kinds
from loraplex_gateway.openai.responses_api import fields
from loraplex_gateway.openai.schema import CommonBody


class _Object(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object of the body."""


class TextFormat(_Object, kw_only=True):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class TextConfig(_Object, kw_only=True):
    """Options of the text."""

    format: TextFormat | None = None


class ReasoningConfig(_Object, kw_only=True):
    """Options of the thoughts."""

    effort: str | None = None


class ResponsesBody(CommonBody, kw_only=True):
    """POST /v1/responses."""

    input: str | list[Any]
    instructions: str | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessageItem(_Object, kw_only=True):
    """One message."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Any]


class FunctionCallItem(_Object, kw_only=True):
    """A call that the model has made."""

    type: str
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(_Object, kw_only=True):
    """What a call has returned."""

    type: str
    call_id: str
    output: str | list[Any]


class ReasoningItem(_Object, kw_only=True):
    """What the model has thought."""

    type: str
    content: list[Any] | None = None
    summary: list[Any] | None = None


class TextPart(_Object, kw_only=True):
    """A part that is text."""

    type: str
    text: str


class FunctionTool(_Object, kw_only=True):
    """A function that the model may call."""

    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def _parts(*types: str) -> Kinds:
    return Kinds(
        name="part", served={kind: Kind(table=fields.PART, struct=TextPart) for kind in types}, others="send text only"
    )


INPUT_PARTS: Final = _parts("input_text", "output_text")
OUTPUT_PARTS: Final = _parts("input_text")
REASONING_PARTS: Final = _parts("reasoning_text")
SUMMARY_PARTS: Final = _parts("summary_text")

ITEMS: Final = Kinds(
    name="item",
    served={
        "message": Kind(table=fields.MESSAGE, struct=MessageItem),
        "function_call": Kind(table=fields.FUNCTION_CALL, struct=FunctionCallItem),
        "function_call_output": Kind(table=fields.FUNCTION_CALL_OUTPUT, struct=FunctionCallOutputItem),
        "reasoning": Kind(table=fields.REASONING_ITEM, struct=ReasoningItem),
    },
    refused={
        "item_reference": fields.NOTHING_KEPT,
        "compaction": "nothing is compacted here; send the items themselves",
        "custom_tool_call": "tools are functions here; send a function_call",
        "custom_tool_call_output": "tools are functions here; send a function_call_output",
    },
    others=fields.NO_HOSTED,
    default="message",
)

TOOLS: Final = Kinds(
    name="tool", served={"function": Kind(table=fields.TOOL, struct=FunctionTool)}, others=fields.NO_HOSTED
)
