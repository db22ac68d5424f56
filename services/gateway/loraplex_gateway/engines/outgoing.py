"""What is to be sent on one session: submissions and aborts gather here while a write is pending."""

from __future__ import annotations

import asyncio
from typing import Final

from loraplex.v1 import engine_pb2

# Far below the 4 MiB limit of a message.
MAX_BATCH_BYTES: Final = 1024 * 1024


class Outgoing:
    """Submissions and aborts that no message has taken yet."""

    def __init__(self) -> None:
        self._submits: dict[int, engine_pb2.Submit] = {}
        self._aborts: dict[int, None] = {}  # slots to abort, in order
        self._has_any = asyncio.Event()

    @property
    def unsent(self) -> set[int]:
        """Slots whose submissions are still here: the engine has never heard of them."""
        return set(self._submits)

    def submit(self, message: engine_pb2.Submit) -> None:
        """Have a request sent with one of the next messages."""
        self._submits[message.slot] = message
        self._has_any.set()

    def withdraw(self, slot: int) -> bool:
        """Take a submission back; return whether it was still here."""
        return self._submits.pop(slot, None) is not None

    def abort(self, slot: int) -> None:
        """Have a request aborted with the next message."""
        self._aborts[slot] = None
        self._has_any.set()

    def forget_abort(self, slot: int) -> None:
        """Abort a slot no more: sent now, it would hit the slot's next request.

        An engine reads a message's submits before its aborts.
        """
        self._aborts.pop(slot, None)

    async def wait(self) -> None:
        """Wait until there may be something to send."""
        await self._has_any.wait()

    def next_batch(self) -> engine_pb2.SessionRequest | None:
        """Return the next message, at most `MAX_BATCH_BYTES` of submissions in it; None if there is nothing to send."""
        request = engine_pb2.SessionRequest()
        num_bytes = 0
        while self._submits and num_bytes < MAX_BATCH_BYTES:
            slot, submit = next(iter(self._submits.items()))
            size = submit.ByteSize()
            if num_bytes and num_bytes + size > MAX_BATCH_BYTES:
                break
            del self._submits[slot]
            request.submits.append(submit)
            num_bytes += size
        request.aborts.extend(engine_pb2.Abort(slot=slot) for slot in self._aborts)
        self._aborts.clear()
        if not self._submits:
            self._has_any.clear()
        return request if request.submits or request.aborts else None
