"""What the asyncio client does otherwise than the blocking one; `_sync.waiting` has the same names."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from loraplex.v1 import gateway_pb2
from loraplex_common.errors import CancelledRequestError, LoraplexError
from loraplex_common.kept_status import answer_of

from loraplex_client._errors import translated
from loraplex_client._outgoing import Outgoing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    import grpc

__all__ = [
    "CallOwner",
    "Flag",
    "GenerateCall",
    "Outgoing",
    "answer_of",
    "in_thread",
    "next_message",
    "read_in_thread",
    "sending",
]

T = TypeVar("T")
P = ParamSpec("P")
GenerateCall: TypeAlias = "grpc.aio.UnaryStreamCall[gateway_pb2.GenerateRequest, gateway_pb2.GenerateResponse]"


class Flag:
    """Set once, by any task."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """Set it and wake all tasks that wait."""
        self._event.set()

    def is_set(self) -> bool:
        """Return whether it is set."""
        return self._event.is_set()

    async def wait(self, timeout_s: float) -> bool:
        """Wait until it is set, or for `timeout_s` seconds; return whether it is set."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), timeout_s)
        return self._event.is_set()


class CallOwner:
    """Owns a call that ends when its owner is dropped: a call of `grpc.aio` does so by itself."""


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a function that reads files returns; the event loop goes on meanwhile."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def read_in_thread(items: Iterator[T]) -> AsyncIterator[T]:
    """Yield what a generator that reads files yields; the event loop goes on meanwhile."""
    while (item := await asyncio.to_thread(next, items, None)) is not None:
        yield item


@contextlib.contextmanager
def sending(messages: Outgoing[Any], target: str) -> Iterator[None]:
    """Raise what a call that sends these messages failed with; if it failed because one could not be made, what that said.

    Raises:
        LoraplexError: For a failure of gRPC.
        CancelledRequestError: If the call was ended by this process, but not by cancelling the task that waits for it.
    """
    try:
        with translated(target):
            yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise messages.error or CancelledRequestError("the call or its client was closed") from None
    except LoraplexError as error:
        raise messages.error or error from error.__cause__


async def next_message(call: GenerateCall) -> gateway_pb2.GenerateResponse | None:
    """Return the next message of a call; None once it has ended.

    Raises:
        grpc.RpcError: If the call failed.
        CancelledRequestError: If the call was ended by this process, but not by cancelling the task that reads it.
    """
    try:
        response = await call.read()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise CancelledRequestError("the stream or its client was closed") from None
    return response if isinstance(response, gateway_pb2.GenerateResponse) else None  # the end-of-stream mark
