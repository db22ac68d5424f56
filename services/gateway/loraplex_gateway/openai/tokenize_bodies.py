"""Bodies of /tokenize and /detokenize, and the prompts that they mean."""

from __future__ import annotations

from typing import Any

import msgspec
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai import further_fields
from loraplex_gateway.openai.body import BODIES
from loraplex_gateway.openai.chat_body import chat_message, offered_function
from loraplex_gateway.openai.schema import BodyAdapter, ChatTurn, Tool
from loraplex_gateway.text.prompt_size import check_num_messages
from loraplex_gateway.types import ChatPrompt, TextPrompt


class TokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /tokenize."""

    model: str | None = None
    adapters: list[BodyAdapter] | None = None
    prompt: str | None = None
    messages: list[ChatTurn] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


BODIES[TokenizeBody] = further_fields.TOKENIZE
BODIES[DetokenizeBody] = further_fields.DETOKENIZE


def prompt_of(body: TokenizeBody) -> TextPrompt | ChatPrompt:
    """Return what is to be tokenised.

    Raises:
        InvalidParameterError: If it is neither text nor messages, or both, or a field goes with the other of the two.
    """
    if (body.prompt is None) == (body.messages is None):
        raise InvalidParameterError("send exactly one of prompt and messages", field="prompt")
    if body.messages is None:
        for name in ("tools", "chat_template_kwargs"):
            if getattr(body, name):
                raise InvalidParameterError(f"{name} goes with messages", field=name)
        return TextPrompt(text=body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    if body.add_special_tokens:
        raise InvalidParameterError(
            "add_special_tokens goes with prompt only: the chat template writes the special tokens of messages",
            field="add_special_tokens",
        )
    check_num_messages(len(body.messages))
    return ChatPrompt(
        messages=tuple(chat_message(n, turn) for n, turn in enumerate(body.messages)),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs or {},
        tools=tuple(offered_function(n, tool) for n, tool in enumerate(body.tools or ())),
    )
