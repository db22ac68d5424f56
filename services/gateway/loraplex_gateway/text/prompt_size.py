"""How large a prompt is, found out before anything is done with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import ContextLengthError, InvalidParameterError
from loraplex_common.request_limits import MAX_MESSAGES

from loraplex_gateway.types import TextPrompt, TokenPrompt

if TYPE_CHECKING:
    from loraplex_gateway.types import ChatMessage, Prompt


def check_num_messages(num_messages: int) -> None:
    """Refuse a conversation of more turns than any template should be run over, before it is looked at turn by turn.

    Raises:
        InvalidParameterError: With both numbers.
    """
    if num_messages > MAX_MESSAGES:
        raise InvalidParameterError(
            f"messages has {num_messages} entries; at most {MAX_MESSAGES} are allowed", field="messages"
        )


def prompt_bytes(prompt: Prompt) -> int:
    """Return how many bytes of text a prompt brings, everything counted that a chat template may write out."""
    if isinstance(prompt, TokenPrompt):
        return 0
    if isinstance(prompt, TextPrompt):
        return num_bytes_of(prompt.text)
    messages = sum(_message_bytes(message) for message in prompt.messages)
    rest = [value for value in (prompt.template_kwargs, prompt.tools, prompt.documents, prompt.template) if value]
    return messages + sum(num_bytes_of(str(value)) for value in rest)


def _message_bytes(message: ChatMessage) -> int:
    texts = (message.role, message.content, message.name or "", message.reasoning or "", message.tool_call_id or "")
    calls = (text for call in message.tool_calls for text in (call.id, call.name, call.arguments))
    return sum(num_bytes_of(text) for text in (*texts, *calls))


def check_bytes(num_bytes: int, max_bytes: int | None) -> None:
    """Refuse text that is too long to be tokenised.

    Raises:
        ContextLengthError: With both numbers.
    """
    if max_bytes is not None and num_bytes > max_bytes:
        raise ContextLengthError(
            f"This model's maximum context length is exceeded: the prompt has {num_bytes} bytes, its roles and names and what "
            f"the chat template adds included; no sequence of this model has more than {max_bytes}; shorten the prompt",
            field="prompt",
            metadata={"prompt_bytes": str(num_bytes), "max_prompt_bytes": str(max_bytes)},
        )


def num_bytes_of(text: str) -> int:
    """Return the length of a text in UTF-8; lone surrogates, which are refused elsewhere, count as well."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
