"""How /v1/responses and /v1/messages ask for what they need: as the chat completion that asks for the same."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai.convert import chat_plan
from loraplex_gateway.openai.schema import ChatBody, CommonBody

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_gateway.openai.convert import IsBase, Plan
    from loraplex_gateway.openai.other_names import OtherNames
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


def chat_plan_of(chat: ChatBody, is_base: IsBase, *, origin: Origin, names: OtherNames) -> Plan:
    """Return the plan of a chat body, its errors in the words of the body that it was made from.

    Raises:
        InvalidParameterError: For what is not served.
    """
    try:
        return replace(chat_plan(chat, is_base, origin=origin), names=names)
    except InvalidParameterError as error:
        raise names.refusal(error) from error
