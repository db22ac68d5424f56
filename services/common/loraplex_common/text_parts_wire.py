"""Converts text parts to the contract's message and back, for stores and gateways."""

from __future__ import annotations

from loraplex.v1 import adapter_store_pb2

from loraplex_common.added_tokens import FLAGS, AddedToken
from loraplex_common.text_parts import GENERATION_RANGES, TextParts


def to_message(parts: TextParts) -> adapter_store_pb2.GetTextPartsResponse:
    """Return the message of some parts."""
    message = adapter_store_pb2.GetTextPartsResponse(
        chat_template=parts.chat_template,
        special_tokens=dict(parts.special_tokens),
        stop_token_ids=parts.stop_token_ids,
        response_schema=parts.response_schema,
        invocation_token_ids=parts.invocation_token_ids,
        added_tokens=[
            adapter_store_pb2.GetTextPartsResponse.AddedToken(**token.to_fields()) for token in parts.added_tokens
        ],
    )
    for name, value in parts.generation.items():
        setattr(message.generation_defaults, name, value)
    return message


def from_message(message: adapter_store_pb2.GetTextPartsResponse) -> TextParts:
    """Return the parts of a message."""
    defaults = message.generation_defaults
    named = {field.name for field, _ in defaults.ListFields()}
    return TextParts(
        chat_template=message.chat_template,
        special_tokens=dict(message.special_tokens),
        generation={name: getattr(defaults, name) for name in GENERATION_RANGES if name in named},
        stop_token_ids=tuple(message.stop_token_ids),
        response_schema=message.response_schema,
        invocation_token_ids=tuple(message.invocation_token_ids),
        added_tokens=tuple(
            AddedToken(id=token.id, content=token.content, **{name: getattr(token, name) for name in FLAGS})
            for token in message.added_tokens
        ),
    )
