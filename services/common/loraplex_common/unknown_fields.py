"""Finds the fields of a message that this build's protos do not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf import unknown_fields
from google.protobuf.message import Message

from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Iterable


def refuse_unknown_fields(message: Message) -> None:
    """Refuse a request with fields that this server does not know: protobuf would drop them silently.

    Raises:
        InvalidParameterError: Names the message and the field's number.
    """
    _refuse(message, "")


def _refuse(message: Message, path: str) -> None:
    unknown = unknown_fields.UnknownFieldSet(message)
    if len(unknown):
        name = f"{path}{unknown[0].field_number}"
        raise InvalidParameterError(
            f"{name} is no field of {message.DESCRIPTOR.full_name} here: the caller is of a newer version, "
            "or the message is another; leave the field out, or update this server",
            field=name,
        )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue  # the maps in our requests hold numbers
        for n, inner in _messages(value):
            _refuse(inner, f"{path}{field.name}{n}.")


def _messages(value: Message | Iterable[Message]) -> Iterable[tuple[str, Message]]:
    if isinstance(value, Message):
        return (("", value),)
    return ((f"[{n}]", inner) for n, inner in enumerate(value))
