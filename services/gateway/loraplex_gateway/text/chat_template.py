"""Chat templates: the model's own Jinja, run in a sandbox with the globals that `transformers` gives it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Final

import jinja2
from loraplex_common.chat_sandbox import chat_environment
from loraplex_common.errors import InvalidParameterError
from loraplex_common.tokenizer_config import SPECIAL_TOKENS, read_special_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from loraplex_gateway.types import ChatMessage, ChatPrompt

MAX_REASON_CHARS: Final = 500
# In front of a space, which shows whether the template strips what it renders.
_MARK: Final = "ENDOFTHEFINALMESSAGE"
# A template is a program of the model's: what it raises over a conversation is its refusal.
_TEMPLATES_OWN_ERRORS: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


# Variables that loraplex sets itself, the sandbox's own, and the arguments of transformers' apply_chat_template.
RESERVED_VARIABLES: Final = frozenset(
    {
        *("messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template"),
        *("conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "loop", "self", "caller", "varargs", "kwargs"),
        *SPECIAL_TOKENS,
        *chat_environment().globals,
    }
)


class ChatTemplateError(ValueError):
    """The model's chat template cannot be read; the message names the file."""


class ChatTemplate:
    """One compiled template with the model's special tokens.

    Args:
        source: Jinja source.
        special_tokens: ``{"bos_token": "<s>", ...}`` as the template sees them.

    Raises:
        ChatTemplateError: If the source is no valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = chat_environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"chat template, line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, prompt: ChatPrompt) -> str:
        """Return the conversation as text, special tokens written out.

        Raises:
            InvalidParameterError: If the template refuses the conversation, with the template's own words.
        """
        messages = [_as_dict(message) for message in prompt.messages]
        if not prompt.continue_final_message:
            return self._render(messages, prompt, add_generation_prompt=prompt.add_generation_prompt)
        # Drawn anew each time: no conversation can hold it, so that none has to be searched for it.
        final, mark = messages[-1]["content"], _MARK + secrets.token_hex(16).upper()
        messages[-1]["content"] = f"{final}{mark} "
        return _cut_at_mark(self._render(messages, prompt, add_generation_prompt=False), mark, final)

    def _render(self, messages: list[dict[str, str]], prompt: ChatPrompt, *, add_generation_prompt: bool) -> str:
        variables = {
            **prompt.template_kwargs,
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, *_TEMPLATES_OWN_ERRORS) as error:
            reason = str(error)[:MAX_REASON_CHARS]  # it may quote the conversation
            what = "these messages with these chat_template_kwargs" if prompt.template_kwargs else "these messages"
            raise InvalidParameterError(
                f"the model's chat template refuses {what}: {reason}", field="messages"
            ) from error


def _as_dict(message: ChatMessage) -> dict[str, str]:
    turn = {"role": message.role, "content": message.content}
    return turn if message.name is None else {**turn, "name": message.name}


def _cut_at_mark(rendered: str, mark: str, final: str) -> str:
    """Return what is in front of the mark that was put behind the final message.

    A template that strips its messages strips the mark's space, too; then the final message's own spaces go as well.

    Source: transformers 5, utils/chat_template_utils.py, which looks for a mark in the same way.
    """
    head, found, tail = rendered.rpartition(mark)
    if found and not tail.startswith(" "):
        head = head.rstrip() if final.strip() else head  # nothing but space is stripped to an open turn
    if not found or not head.rstrip().endswith(final.strip()):
        raise InvalidParameterError(
            "continue_final_message is not possible here: the model's chat template leaves out or changes the final "
            "message, so there is no place in the prompt where it ends; send the prompt as text",
            field="messages",
        )
    return head


def load_chat_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """Return a model's chat template, or None if it has none.

    Args:
        directory: Model directory; its chat_template.jinja goes before what the config holds.
        config: tokenizer_config.json as read.

    Raises:
        ChatTemplateError: If the template is unreadable.
    """
    file = directory / "chat_template.jinja"
    source: Any = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if source is None:
        return None
    return ChatTemplate(str(source), read_special_tokens(config))
