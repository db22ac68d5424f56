"""Messages that wait to be sent to one engine: few, so that a slow engine slows only its own transfers."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from loraplex_adapter_store.attach.messages import Written

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_adapter_store.attach.messages import Ack, ToEngine

LENGTH: Final = 8  # messages; a chunk has 1 MiB


class Outbox:
    """A bounded queue, in order, and beside it what never waits for room: the latest acknowledgement, and pages written.

    Pages that have been written gather until there are enough for a message, or another message is there, which they go before:
    an image's pages are named before its `Filled`, and after its offer.

    Args:
        written_at_once: Pages of an image that are named without waiting for another message.
    """

    def __init__(self, written_at_once: int) -> None:
        self._written_at_once = written_at_once
        self._messages: deque[ToEngine] = deque()
        self._room = asyncio.Semaphore(LENGTH)
        self._ack: Ack | None = None
        self._written: dict[tuple[str, int], list[int]] = {}  # (digest, rank) -> pages
        self._wake = asyncio.Event()
        self._is_closed = False

    async def put(self, message: ToEngine) -> None:
        """Add a message once there is room."""
        await self._room.acquire()
        self._messages.append(message)
        self._wake.set()

    def acknowledge(self, ack: Ack) -> None:
        """Replace the acknowledgement to be sent."""
        self._ack = ack
        self._wake.set()

    def note_written(self, digest: str, rank: int, pages: Iterable[int]) -> None:
        """Add pages of an image to those that are said to be written; there are as many as the image has at most."""
        self._written.setdefault((digest, rank), []).extend(pages)
        if self._is_written_due():
            self._wake.set()

    def close(self) -> None:
        """Let `get` return None from now on."""
        self._is_closed = True
        self._wake.set()

    async def get(self) -> ToEngine | None:
        """Return the next message to send; None once closed."""
        while not self._is_closed:
            if self._ack is not None:
                ack, self._ack = self._ack, None
                return ack
            if self._written and (self._messages or self._is_written_due()):
                digest, rank = next(iter(self._written))
                return Written(digest, rank, tuple(self._written.pop((digest, rank))))
            if self._messages:
                self._room.release()
                return self._messages.popleft()
            self._wake.clear()
            await self._wake.wait()
        return None

    def _is_written_due(self) -> bool:
        return any(len(pages) >= self._written_at_once for pages in self._written.values())
