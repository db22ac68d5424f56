"""Bodies of POST /v1/messages and its count_tokens: the fields that `fields` calls served, with their types."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from loraplex_gateway.openai.messages_api import fields
from loraplex_gateway.openai.objects import Kind, Kinds
from loraplex_gateway.openai.schema import CommonBody


class _Object(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON object of the body."""


class OutputFormat(_Object, kw_only=True):
    """What the text must look like."""

    type: Literal["json_schema"]
    schema: dict[str, Any] | bool


class OutputConfig(_Object, kw_only=True):
    """Options of the output."""

    format: OutputFormat | None = None
    effort: str | None = None


class Thinking(_Object, kw_only=True):
    """Whether the model thinks first."""

    type: Literal["enabled", "disabled", "adaptive"]


class ToolChoice(_Object, kw_only=True):
    """Which tools the model calls."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class MessagesBody(CommonBody, kw_only=True):
    """POST /v1/messages."""

    messages: list[Any]
    max_tokens: int
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    stop_sequences: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CountTokensBody(CommonBody, kw_only=True):
    """POST /v1/messages/count_tokens."""

    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessageTurn(_Object, kw_only=True):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Any]


class TextBlock(_Object, kw_only=True):
    """Words."""

    type: str
    text: str


class ToolUseBlock(_Object, kw_only=True):
    """A call that the model has made."""

    type: str
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Object, kw_only=True):
    """What a call has returned."""

    type: str
    tool_use_id: str
    content: str | list[Any] = ""
    is_error: bool = False


class ThinkingBlock(_Object, kw_only=True):
    """What the model has thought."""

    type: str
    thinking: str


class CustomTool(_Object, kw_only=True):
    """A tool of the caller's."""

    type: str = "custom"
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


_TEXT: Final = Kind(table=fields.TEXT_BLOCK, struct=TextBlock)
_REFUSED: Final = {
    "redacted_thinking": "another server has encrypted it; leave the block out",
    **dict.fromkeys(
        ("image", "document", "search_result", "container_upload", "tool_reference"),
        f"{fields.ONLY_TEXT}; leave it out",
    ),
}

TEXT_BLOCKS: Final = Kinds(name="block", served={"text": _TEXT}, refused=_REFUSED, others="send text only")
USER_BLOCKS: Final = Kinds(
    name="block",
    served={"text": _TEXT, "tool_result": Kind(table=fields.TOOL_RESULT_BLOCK, struct=ToolResultBlock)},
    refused={**_REFUSED, "tool_use": "it belongs into an assistant's turn"},
    others=fields.NO_SERVER_TOOLS,
)
ASSISTANT_BLOCKS: Final = Kinds(
    name="block",
    served={
        "text": _TEXT,
        "tool_use": Kind(table=fields.TOOL_USE_BLOCK, struct=ToolUseBlock),
        "thinking": Kind(table=fields.THINKING_BLOCK, struct=ThinkingBlock),
    },
    refused={**_REFUSED, "tool_result": "it belongs into a user's turn"},
    others=fields.NO_SERVER_TOOLS,
)
TOOLS: Final = Kinds(
    name="tool",
    served={"custom": Kind(table=fields.TOOL, struct=CustomTool)},
    others=fields.NO_SERVER_TOOLS,
    default="custom",
)
