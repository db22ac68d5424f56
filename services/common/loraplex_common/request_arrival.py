"""Limits what requests hold while they arrive: a message is received only once its caller is known, and not for ever.

gRPC itself reads the one message of a call before any handler runs: 4 MiB for each of thousands of calls, from any
client, for any length of time. Our handlers read it themselves instead, after the caller has been authenticated.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import grpc

from loraplex_common.errors import DeadlineError, InvalidParameterError, SaturatedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Each may hold a whole message, 4 MiB: 256 MiB together. A message that is sent in one go takes only a moment.
MAX_AT_ONCE: Final = 64
# While others wait, an arrival that takes longer than this may lose its place to them.
GRACE_S: Final = 1.0
LONGEST_S: Final = 60.0
RETRY_S: Final = 1.0


@dataclass(slots=True, eq=False)
class _Arrival:
    tenant: str
    began_at: float
    limit: asyncio.Timeout
    is_given_up: bool = field(default=False)


class RequestArrivals:
    """Receives the message of calls that have exactly one.

    Args:
        max_at_once: Concurrent arrivals; further ones wait until one of them is complete.
        grace_s: While calls wait, the oldest arrival that has taken longer than this is ended, of the tenant with the
            most.
        longest_s: Longest time of one arrival.
    """

    def __init__(
        self, *, max_at_once: int = MAX_AT_ONCE, grace_s: float = GRACE_S, longest_s: float = LONGEST_S
    ) -> None:
        self._places = asyncio.Semaphore(max_at_once)
        self._grace_s = grace_s
        self._longest_s = longest_s
        self._arriving: dict[_Arrival, None] = {}  # in the order in which they began
        self._num_waiting = 0
        self._relief: asyncio.TimerHandle | None = None

    @property
    def is_full(self) -> bool:
        """Whether a further call has to wait."""
        return self._places.locked()

    async def receive(self, read: Callable[[], Awaitable[Any]], *, tenant: str) -> Any:
        """Return the message of a call, as ``read`` gives it, or `grpc.aio.EOF`.

        Raises:
            InvalidParameterError: If the call ends without one.
            DeadlineError: If the message takes too long.
            SaturatedError: If the message takes long and others wait for its place.
        """
        self._num_waiting += 1
        try:
            if self.is_full:
                self._plan_relief()
            await self._places.acquire()
        finally:
            self._num_waiting -= 1
        try:
            return await self._receive(read, tenant)
        finally:
            self._places.release()

    async def _receive(self, read: Callable[[], Awaitable[Any]], tenant: str) -> Any:
        limit = asyncio.timeout(self._longest_s)
        arrival = _Arrival(tenant, asyncio.get_running_loop().time(), limit)
        self._arriving[arrival] = None
        try:
            async with limit:
                message = await read()
        except TimeoutError:
            if arrival.is_given_up:
                raise SaturatedError(
                    "the request came slowly while others waited for the room that it held; send it again",
                    retry_after_s=RETRY_S,
                    drop_reason="rejected-saturated",
                ) from None
            raise DeadlineError(f"the request did not come within {self._longest_s:.0f} s") from None
        finally:
            del self._arriving[arrival]
        if message is grpc.aio.EOF:
            raise InvalidParameterError("the call ended without a request")
        return message

    def _plan_relief(self) -> None:
        if self._relief is None:
            loop = asyncio.get_running_loop()
            oldest = next(iter(self._arriving), None)
            due_at = loop.time() if oldest is None else oldest.began_at + self._grace_s
            self._relief = loop.call_at(max(due_at, loop.time() + self._grace_s / 10), self._relieve)

    def _relieve(self) -> None:
        """End as many slow arrivals as there are calls waiting."""
        self._relief = None
        now = asyncio.get_running_loop().time()
        slow = [a for a in self._arriving if not a.is_given_up and now - a.began_at >= self._grace_s]
        held = Counter(arrival.tenant for arrival in self._arriving)
        for _ in range(min(self._num_waiting, len(slow))):
            victim = max(slow, key=lambda arrival: held[arrival.tenant])  # the first such arrival, which is the oldest
            slow.remove(victim)
            held[victim.tenant] -= 1
            victim.is_given_up = True
            victim.limit.reschedule(now)
        if self._num_waiting:
            self._plan_relief()
