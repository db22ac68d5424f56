"""What a request continues: text, token ids, or a conversation with the functions that it offers."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


class ToolMode(enum.Enum):
    """Whether a chat's output may or must call functions of its prompt."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputParsing:
    """How a chat's output is taken apart into thoughts, content and calls.

    Attributes:
        tool_mode: Whether it may or must call one of the prompt's functions.
        is_parallel: Whether it may make more than one call.
    """

    tool_mode: ToolMode = ToolMode.NONE
    is_parallel: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call of a function that an assistant's turn made; the arguments are a JSON object's text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatMessage:
    """One turn of a conversation.

    Attributes:
        tool_calls: The calls that an assistant's turn made.
        tool_call_id: The call that a turn of role ``tool`` answers.
        reasoning: What an assistant's turn thought before its content.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPrompt:
    """Text, tokenised with the model's special tokens unless told otherwise."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are."""

    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrompt:
    """A conversation, rendered through the chat template.

    Attributes:
        template_kwargs: Further variables of the template, JSON values by name.
        tools: JSON objects of OpenAI's ``tools[].function``, in their order.
        documents: JSON objects for templates that read `documents`.
        reasoning_effort: For templates that read it; ``none`` turns the thinking off where a template can.
        template: A template of the request's own; None for the model's.
    """

    messages: tuple[ChatMessage, ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    documents: tuple[Mapping[str, Any], ...] = ()
    reasoning_effort: str | None = None
    template: str | None = None


Prompt: TypeAlias = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptText:
    """A prompt as text: as it was sent, or what its token ids stand for.

    Attributes:
        offsets: Characters of the text before each of the prompt's tokens.
        first_token: The bytes that its first token stands for: it is the one without a log-probability.
    """

    text: str
    offsets: tuple[int, ...]
    first_token: bytes
