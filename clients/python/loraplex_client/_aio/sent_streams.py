"""Calls that send a stream of messages, for asyncio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import grpc
from loraplex_common.errors import LoraplexError

from loraplex_client._aio.waiting import Flag, Outgoing, answer_of, read_in_thread, sending

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from google.protobuf.message import Message

    from loraplex_client._connection import Connection

PAUSES_S: Final = (0.1, 0.2)
"""Before each further attempt, unless the server says how long."""
MAX_REPEATED_BYTES: Final = 256 * 1024
"""A call that has sent more is not made again: the caller decides."""


async def send(
    method: Callable[..., Any], make_messages: Callable[[], Iterator[Message]], connection: Connection
) -> Any:
    """Return the answer of a call; a server that is not available is asked again, as gRPC does it for other calls.

    Args:
        method: Makes the call: a stub's method.
        make_messages: Returns the messages, for each attempt anew.
        connection: Where the server is, and what it is shown.

    Raises:
        BaseException: What making the messages failed with.
        LoraplexError: If the call failed.
        CancelledRequestError: If the client was closed.
    """
    for pause_s in PAUSES_S:
        messages = Outgoing(make_messages())
        try:
            return await _send_once(method, messages, connection)
        except LoraplexError as error:
            is_over = error is messages.error or messages.num_bytes > MAX_REPEATED_BYTES
            if is_over or error.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            await Flag().wait(pause_s if error.retry_after_s is None else error.retry_after_s)
    return await _send_once(method, Outgoing(make_messages()), connection)


async def _send_once(method: Callable[..., Any], messages: Outgoing[Message], connection: Connection) -> Any:
    with sending(messages, connection.target):
        return await answer_of(method(read_in_thread(messages), metadata=connection.metadata))
