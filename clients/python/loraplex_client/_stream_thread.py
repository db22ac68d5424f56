"""A stream of messages read with a limit on silence, which a blocking stream of gRPC does not have."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")
_END: Final = object()


def news_or_silence(messages: Iterable[T], silence_s: float) -> Iterator[T | None]:
    """Yield each message, and None after so many seconds without one.

    A thread reads the messages; it ends with them, so the caller cancels the call that they come from.

    Raises:
        Exception: What reading the messages raises.
    """
    read: queue.SimpleQueue[object] = queue.SimpleQueue()

    def follow() -> None:
        try:
            for message in messages:
                read.put((message,))
        except Exception as error:  # for the caller to raise
            read.put(error)
        else:
            read.put(_END)

    threading.Thread(target=follow, name="stream", daemon=True).start()
    while True:
        try:
            found = read.get(timeout=silence_s)
        except queue.Empty:
            yield None
            continue
        if found is _END:
            return
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, tuple)
        yield found[0]
