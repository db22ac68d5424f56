"""Tries a chat template that an adapter brings on short conversations; a program, in a process of its own.

Standard input is JSON: ``source``, and ``special_tokens`` as the template sees them. Standard output is JSON: ``problem``,
or nothing if the template renders a conversation.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from loraplex_common.chat_sandbox import chat_environment

from loraplex_adapter_store.checkpoint.bounds import MAX_RENDERED_CHARS

_MAX_REASON_CHARS: Final = 300
_OWN_ERRORS: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_USER: Final = {"role": "user", "content": "Which page comes next?"}
_OTHER_USER: Final = {"role": "user", "content": "What is in it?"}
_ASSISTANT: Final = {"role": "assistant", "content": "The third one."}
_SYSTEM: Final = {"role": "system", "content": "Be brief."}
_CONVERSATIONS: Final = (
    ([_USER], True),
    ([_OTHER_USER], True),
    ([_USER], False),
    ([_SYSTEM, _USER], True),
    ([_USER, _ASSISTANT, _USER], True),
    ([_SYSTEM, _USER, _ASSISTANT], False),
)


class _TooLongError(Exception):
    """A conversation of a few words became a text of `MAX_RENDERED_CHARS` and more."""


def problem(source: str, special_tokens: dict[str, str]) -> str:
    """Return why a template cannot be served; empty if it renders at least one conversation, and none goes too far.

    A template may refuse conversations, such as those with a system turn: requests with one get its refusal.
    """
    environment = chat_environment()
    hidden = [node.attr for node in environment.parse(source).find_all(nodes.Getattr) if node.attr.startswith("_")]
    if hidden:
        return f"it reads the attribute {hidden[0][:60]!r}, which the sandbox has not"
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:  # names of filters and tests are looked up only now
        return f"it is no Jinja: {str(error)[:_MAX_REASON_CHARS]}"
    texts: list[str | None] = []
    refusal = ""
    for messages, opens in _CONVERSATIONS:
        try:
            texts.append(_rendered(template, messages, special_tokens, opens=opens))
        except (SecurityError, _TooLongError) as error:
            return str(error)[:_MAX_REASON_CHARS]
        except (jinja2.TemplateError, *_OWN_ERRORS) as error:
            texts.append(None)
            refusal = refusal or f"{type(error).__name__}: {str(error)[:_MAX_REASON_CHARS]}"
    if not any(text is not None for text in texts):
        return f"it renders no conversation: {refusal}"
    return "it leaves out what the user says" if texts[0] is not None and texts[0] == texts[1] else ""


def _rendered(
    template: jinja2.Template, messages: list[dict[str, str]], special_tokens: dict[str, str], *, opens: bool
) -> str:
    variables: dict[str, Any] = {
        **special_tokens,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": opens,
    }
    pieces, num_chars = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_RENDERED_CHARS:
            raise _TooLongError(
                f"it writes more than {MAX_RENDERED_CHARS} characters for a conversation of a few words"
            )
    return "".join(pieces)


if __name__ == "__main__":
    print(json.dumps({"problem": problem(**json.load(sys.stdin))}))
