"""The messages that a call sends, and what making them failed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Self, TypeVar

from google.protobuf.message import Message

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T", bound=Message)


class NotMadeError(Exception):
    """A message could not be made; `Outgoing.error` says why. gRPC ends the call for it."""


class Outgoing(Generic[T]):
    """An iterator that keeps its failure: gRPC ends the call when one fails, and tells the caller of a cancellation alone.

    Args:
        items: Makes the messages; reads the caller's files or tensors, and calls the caller's functions.

    Attributes:
        error: What it failed with; None as long as it did not.
        num_bytes: Bytes of the messages that were taken.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self.error: BaseException | None = None
        self.num_bytes = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        try:
            message = next(self._items)
        except StopIteration:
            raise
        except BaseException as error:  # gRPC's thread would die of one that is no `Exception`, and the call hang
            self.error = error
            raise NotMadeError from error
        self.num_bytes += message.ByteSize()
        return message
