"""Keeps the status of a call whose client still writes when its server ends it.

When a write fails because its call has ended, `grpc.aio` puts INTERNAL, "Internal error from Core", in the place of the
status that the server sent, be that already known or not. What a call is told before and after is to be seen in its done
callbacks: they are called at each change of the status, before anything else runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import grpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine

LOST_DETAILS: Final = "Internal error from Core"
"""What `grpc.aio` writes over the server's status."""

T = TypeVar("T")
Response = TypeVar("Response")


class KeptStatus:
    """The status that a call's server sent.

    Args:
        call: The call, just begun.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self._error: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._keep)

    def behind(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Return what the server ended the call with, if an error of the call only says that a write failed."""
        return self._error if self._error is not None and _is_lost(error) else error

    def _keep(self, call: Any) -> None:
        error = grpc.aio.AioRpcError(
            _at_once(call.code()),
            _at_once(call.initial_metadata()),
            _at_once(call.trailing_metadata()),
            details=_at_once(call.details()),
            debug_error_string=_at_once(call.debug_error_string()),
        )
        if error.code() is not grpc.StatusCode.OK and not _is_lost(error):
            self._error = error


async def answer_of(call: Awaitable[Response]) -> Response:
    """Return the answer of a call with a stream of requests and one response.

    Args:
        call: The call, just begun.

    Raises:
        grpc.aio.AioRpcError: With the status that the server sent, also if it did not wait for all requests.
    """
    kept = KeptStatus(cast("grpc.aio.Call", call))
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise kept.behind(error) from None


def _is_lost(error: grpc.aio.AioRpcError) -> bool:
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == LOST_DETAILS


def _at_once(asked: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns that has nothing to wait for: later the call may have another status."""
    try:
        asked.send(None)
    except StopIteration as end:
        return cast("T", end.value)
    raise RuntimeError("an ended call does not know its status")
