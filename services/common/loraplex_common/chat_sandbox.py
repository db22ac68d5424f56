"""The sandbox that chat templates run in, with the globals that `transformers` gives them.

Gateways render with it and stores try a stranger's template with it, so that a template behaves alike in both.
"""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.parser import Parser


class GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; it is parsed as its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class says set)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the block's body unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def chat_environment() -> ImmutableSandboxedEnvironment:
    """Return a new sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **keywords: Any) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not.
    keywords.setdefault("ensure_ascii", False)
    return json.dumps(value, indent=indent, **keywords)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
