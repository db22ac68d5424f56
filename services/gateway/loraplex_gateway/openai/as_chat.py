"""How /v1/responses and /v1/messages ask for what they need: as the chat completion that asks for the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai.convert import callable_of, chat_plan, constraining_field
from loraplex_gateway.openai.field_rules import Table
from loraplex_gateway.openai.other_names import Chat, OtherNames, Rename
from loraplex_gateway.openai.schema import ChatBody, CommonBody

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_gateway.openai.convert import Plan
    from loraplex_gateway.openai.model_names import IsBase
    from loraplex_gateway.openai.tracing import Origin


def as_chat(body: CommonBody, own: Mapping[str, Any]) -> ChatBody:
    """Return the chat body of another API's body.

    Args:
        body: The other body; it has the fields that all bodies share.
        own: The fields of the chat body that it says in its own way, as JSON values; None leaves one out.
    """
    members = {name: value for name, value in own.items() if value is not None}
    chat = msgspec.convert({"model": body.model, **members}, ChatBody)
    for name in CommonBody.__struct_fields__:
        if name not in members:
            setattr(chat, name, getattr(body, name))
    chat.stream_options = None
    return chat


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """How a body calls its fields.

    Attributes:
        table: Its own fields.
        renames: What chat completions call otherwise.
        chat: Where in it each turn of the conversation comes from.
    """

    table: Table
    renames: tuple[Rename, ...]
    chat: Chat


def chat_plan_of(body: CommonBody, own: Mapping[str, Any], is_base: IsBase, *, origin: Origin, words: Words) -> Plan:
    """Return the plan of the chat completion that a body asks for, its errors in the body's own words.

    Args:
        body: The other API's body.
        own: As `as_chat` takes it.
        is_base: Tells base models from adapters.
        origin: How the request is known.
        words: How the body calls its fields.

    Raises:
        InvalidParameterError: For what is not served.
    """
    chat = as_chat(body, own)
    constraint = constraining_field(chat)
    named = functools.partial(
        OtherNames, words.table, body, chat=words.chat, renames=words.renames, constraint=constraint
    )
    try:
        plan = chat_plan(chat, is_base, origin=origin)
    except InvalidParameterError as error:
        raise named().refusal(error) from error
    return replace(plan, names=named(callable_tools=callable_of(chat, plan.requests)))
