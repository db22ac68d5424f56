"""What the blocking client does otherwise than the asyncio one; `_aio.waiting` has the same names. Written by hand."""

from __future__ import annotations

import contextlib
from threading import Event as Flag
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from loraplex_common.errors import LoraplexError

from loraplex_client._errors import translated
from loraplex_client._outgoing import Outgoing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc
    from loraplex.v1 import gateway_pb2

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
GenerateCall: TypeAlias = "grpc._CallIterator[gateway_pb2.GenerateResponse]"


class CallOwner:
    """Owns a call that ends when its owner is dropped: a thread of gRPC's keeps a blocking call alive otherwise."""

    _call: GenerateCall

    def __del__(self) -> None:
        if call := getattr(self, "_call", None):  # absent if the first call could not begin
            call.cancel()


def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a function that reads files returns; this thread reads them."""
    return function(*args, **kwargs)


def read_in_thread(items: Iterator[T]) -> Iterator[T]:
    """Return a generator that reads files; gRPC's thread reads them."""
    return items


def answer_of(response: T) -> T:
    """Return the answer of a call with a stream of requests: a blocking call has waited for it, and keeps its status."""
    return response


@contextlib.contextmanager
def sending(messages: Outgoing[Any], target: str) -> Iterator[None]:
    """Raise what a call that sends these messages failed with; if it failed because one could not be made, what that said.

    Raises:
        LoraplexError: For a failure of gRPC.
    """
    try:
        with translated(target):
            yield
    except LoraplexError as error:
        raise messages.error or error from error.__cause__


def next_message(call: GenerateCall) -> gateway_pb2.GenerateResponse | None:
    """Return the next message of a call; None once it has ended.

    Raises:
        grpc.RpcError: If the call failed.
    """
    return next(call, None)
