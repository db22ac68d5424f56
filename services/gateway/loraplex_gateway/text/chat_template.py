"""Chat templates: the model's own Jinja, run in a sandbox with the globals that `transformers` gives it."""

from __future__ import annotations

import copy
import functools
import json
import secrets
from typing import TYPE_CHECKING, Any, Final

import jinja2
from jinja2 import meta
from loraplex_common.chat_sandbox import chat_environment
from loraplex_common.errors import InvalidParameterError
from loraplex_common.tokenizer_config import SPECIAL_TOKENS, read_special_tokens

from loraplex_gateway.text.chat_messages import as_tools, as_turns
from loraplex_gateway.text.default_tools import in_words

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from loraplex_gateway.text.chat_messages import Turn
    from loraplex_gateway.types import ChatPrompt

MAX_REASON_CHARS: Final = 500
# Names of templates that mean something, as transformers picks them.
DEFAULT: Final = "default"
WITH_TOOLS: Final = "tool_use"
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


@functools.lru_cache(maxsize=256)
def variables_of(source: str) -> frozenset[str]:
    """Return the names that a template reads and does not set itself; the source must be valid Jinja."""
    return frozenset(meta.find_undeclared_variables(chat_environment().parse(source)))


class ChatTemplateError(ValueError):
    """The model's chat template cannot be read; the message names the file."""


class ChatTemplate:
    """One compiled template with the model's special tokens.

    Args:
        source: Jinja source.
        special_tokens: ``{"bos_token": "<s>", ...}`` as the template sees them.
        response_template: JSON of how the tokenizer says that its model's answers are taken apart; empty if it does not.

    Attributes:
        source: As given.
        response_template: As given.
        with_tools: What renders conversations with functions, if the model has another template for them.

    Raises:
        ChatTemplateError: If the source is no valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, response_template: str = "") -> None:
        try:
            self._template = chat_environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"chat template, line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise ChatTemplateError("chat template: it is nested too deeply") from error
        self.source = source
        self.response_template = response_template
        self.with_tools: ChatTemplate | None = None
        self._special_tokens = dict(special_tokens)

    @property
    def reads_tools(self) -> bool:
        """Whether it writes out functions itself; else they are put into words."""
        return "tools" in variables_of(self.source)

    def with_response_template(self, response_template: str) -> ChatTemplate:
        """Return this template with another description of the answers."""
        other = copy.copy(self)
        other.response_template = response_template
        if self.with_tools is not None:
            other.with_tools = self.with_tools.with_response_template(response_template)
        return other

    def chosen_for(self, prompt: ChatPrompt) -> ChatTemplate:
        """Return the template that renders a conversation."""
        return self.with_tools if self.with_tools is not None and prompt.tools else self

    def render(self, prompt: ChatPrompt) -> str:
        """Return the conversation as text, special tokens written out.

        Raises:
            InvalidParameterError: If the template refuses the conversation, with the template's own words.
        """
        messages, tools = as_turns(prompt.messages), as_tools(prompt.tools)
        if not self.reads_tools:
            messages, tools = in_words(messages, tools), []
        variables = self._variables(prompt) | {"tools": tools or None}
        render = functools.partial(self._render, messages, variables, prompt)
        if not prompt.continue_final_message:
            return render(opens_answer=prompt.add_generation_prompt)
        # Drawn anew each time: no conversation can hold it, so that none has to be searched for it.
        final, mark = messages[-1]["content"], _MARK + secrets.token_hex(16).upper()
        messages[-1]["content"] = f"{final}{mark} "
        return _cut_at_mark(render(opens_answer=False), mark, final, prompt)

    def _variables(self, prompt: ChatPrompt) -> dict[str, Any]:
        """Return what the request sets.

        Raises:
            InvalidParameterError: For what OpenAI's API or vLLM has and this template has no use for.
        """
        variables, effort = dict(prompt.template_kwargs), prompt.reasoning_effort
        if prompt.documents and "documents" not in variables_of(self.source):
            raise _unused(prompt, "documents", "has no place for them; put them into a message")
        if effort == "none" and "enable_thinking" in variables_of(self.source):
            variables.setdefault("enable_thinking", False)
        if effort is not None and "reasoning_effort" in variables_of(self.source):
            variables.setdefault("reasoning_effort", effort)
        elif effort not in (None, "none"):
            raise _unused(prompt, "reasoning_effort", "does not read it; leave it out")
        documents = [dict(item) for item in prompt.documents]
        return {**variables, **self._special_tokens, "documents": documents or None}

    def _render(
        self, messages: list[Turn], variables: dict[str, Any], prompt: ChatPrompt, *, opens_answer: bool
    ) -> str:
        try:
            text = self._template.render({**variables, "messages": messages, "add_generation_prompt": opens_answer})
            text.encode()  # a template may write lone surrogates, which no tokenizer takes
            return text
        except (jinja2.TemplateError, *_TEMPLATES_OWN_ERRORS) as error:
            reason = str(error)[:MAX_REASON_CHARS]  # it may quote the conversation
            raise InvalidParameterError(
                f"{_whose(prompt)} chat template refuses {_what_of(prompt)}: {reason}", field=_blamed(prompt)
            ) from error


def _unused(prompt: ChatPrompt, field: str, why: str) -> InvalidParameterError:
    return InvalidParameterError(f"{field} is not supported: {_whose(prompt)} chat template {why}", field=field)


def _whose(prompt: ChatPrompt) -> str:
    return "the model's" if prompt.template is None else "the request's own"


def _blamed(prompt: ChatPrompt) -> str:
    """Return the field that a template's refusal is about: of the messages' template, or of the request's own."""
    return "messages" if prompt.template is None else "chat_template"


def _what_of(prompt: ChatPrompt) -> str:
    """Return what a template may have refused."""
    given = {"chat_template_kwargs": prompt.template_kwargs, "tools": prompt.tools, "documents": prompt.documents}
    names = [name for name, value in given.items() if value]
    return f"these messages with these {' and '.join(names)}" if names else "these messages"


def _cut_at_mark(rendered: str, mark: str, final: str, prompt: ChatPrompt) -> str:
    """Return what is in front of the mark that was put behind the final message.

    A template that strips its messages strips the mark's space, too; then the final message's own spaces go as well.

    Source: transformers 5, utils/chat_template_utils.py, which looks for a mark in the same way.
    """
    head, found, tail = rendered.rpartition(mark)
    if found and not tail.startswith(" "):
        head = head.rstrip() if final.strip() else head  # nothing but space is stripped to an open turn
    if not found or not head.rstrip().endswith(final.strip()):
        raise InvalidParameterError(
            f"continue_final_message is not possible here: {_whose(prompt)} chat template leaves out or changes the "
            "final message, so there is no place in the prompt where it ends; send the prompt as text",
            field=_blamed(prompt),
        )
    return head


def load_chat_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """Return a model's chat template, or None if it has none that is called ``default``.

    Args:
        directory: Model directory; see `_sources`.
        config: tokenizer_config.json as read.

    Raises:
        ChatTemplateError: If a template is unreadable.
    """
    sources = _sources(directory, config)
    if DEFAULT not in sources:
        return None
    described = config.get("response_template") or config.get("response_schema")
    response_template = json.dumps(described, ensure_ascii=False) if described else ""
    make = functools.partial(
        ChatTemplate, special_tokens=read_special_tokens(config), response_template=response_template
    )
    template = make(sources[DEFAULT])
    if WITH_TOOLS in sources:
        template.with_tools = make(sources[WITH_TOOLS])
    return template


def _sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return a model's templates by name, of the first place that has some.

    Source: transformers 5, `PreTrainedTokenizerBase.from_pretrained`: chat_template.jinja and additional_chat_templates/
    go before tokenizer_config.json. What is last, chat_template.json, only its processors read: nothing goes before them.
    """
    files = [directory / "chat_template.jinja", *sorted((directory / "additional_chat_templates").glob("*.jinja"))]
    names = [DEFAULT, *(file.stem for file in files[1:])]
    found = {name: _text_of(file) for name, file in zip(names, files, strict=True) if file.is_file()}
    legacy = directory / "chat_template.json"
    if found or not legacy.is_file():
        return found or _named(config.get("chat_template"))
    try:
        fields = json.loads(_text_of(legacy))
    except ValueError as error:
        raise ChatTemplateError(f"{legacy} is no JSON: {error}") from error
    return _named(config.get("chat_template")) or _named(
        fields.get("chat_template") if isinstance(fields, dict) else None
    )


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise ChatTemplateError(f"{file} is no UTF-8: {error}") from error


def _named(value: Any) -> dict[str, str]:
    """Return the templates of a configuration: a text, a list of ``{"name", "template"}``, or name -> template."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    named = value if isinstance(value, dict) else {DEFAULT: value}
    return {name: source for name, source in named.items() if isinstance(name, str) and isinstance(source, str)}
