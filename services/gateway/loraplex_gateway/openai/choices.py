"""Runs the choices of one HTTP request side by side as one stream of events."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from loraplex_common.auth import Principal

    from loraplex_gateway.quotas.calls import QuotaCall
    from loraplex_gateway.requests.core import GatewayCore
    from loraplex_gateway.requests.tap import Sink
    from loraplex_gateway.types import Event, GenerationRequest


@dataclass(frozen=True, slots=True)
class _End:
    """A choice has finished, or failed."""

    error: BaseException | None


class Choices:
    """The choices of one call, not yet begun.

    Args:
        core: Generates.
        requests: One per choice.
        caller: The principal that asks.
        quota: What the tenant may use.

    Attributes:
        is_waiting: Whether every event so far has been taken, and the next one is waited for.
    """

    def __init__(
        self, core: GatewayCore, requests: Sequence[GenerationRequest], *, caller: Principal, quota: QuotaCall
    ) -> None:
        self.is_waiting = False
        self._core = core
        self._requests = requests
        self._caller = caller
        self._quota = quota
        # One place per choice: a reader that lags holds every choice back, and the core's buffers fill instead.
        self._queue: asyncio.Queue[tuple[int, Event | _End]] = asyncio.Queue(maxsize=len(requests))

    async def run(self, sink_of: Callable[[int], Sink | None]) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield (choice, event) until every choice has finished; the first failure ends them all.

        Args:
            sink_of: Returns what writes a choice's plain chunks by itself, while `is_waiting`.

        Raises:
            LoraplexError: What a choice was refused or failed with.
        """
        if len(self._requests) == 1:
            async with aclosing(self._generate(self._requests[0], sink_of(0))) as events:
                self.is_waiting = True  # whenever a generator of events waits, all that it yielded has been taken
                async for event in events:
                    yield 0, event
            return
        counted = replace(self._requests[0], num_choices=len(self._requests))
        requests = [counted, *(replace(request, num_choices=0) for request in self._requests[1:])]
        tasks = [
            asyncio.create_task(self._run(choice, request, sink_of(choice)), name=f"choice-{choice}")
            for choice, request in enumerate(requests)
        ]
        try:
            async with aclosing(self._merged(len(tasks))) as items:
                async for item in items:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _generate(self, request: GenerationRequest, sink: Sink | None) -> AsyncGenerator[Event, None]:
        return self._core.generate(request, caller=self._caller, time_left_s=None, quota=self._quota, sink=sink)

    async def _run(self, choice: int, request: GenerationRequest, sink: Sink | None) -> None:
        error: BaseException | None = None
        try:
            async with aclosing(self._generate(request, sink)) as events:
                async for event in events:
                    self.is_waiting = False
                    await self._queue.put((choice, event))
                    self.is_waiting = False  # also if it had to wait, and the queue was found empty meanwhile
        except Exception as caught:
            error = caught
        await self._queue.put((choice, _End(error)))

    async def _merged(self, num_running: int) -> AsyncGenerator[tuple[int, Event], None]:
        while num_running:
            self.is_waiting = self._queue.empty()
            choice, item = await self._queue.get()
            self.is_waiting = False
            if not isinstance(item, _End):
                yield choice, item
                continue
            if item.error is not None:
                raise item.error
            num_running -= 1


def generate_choices(
    core: GatewayCore, requests: Sequence[GenerationRequest], *, caller: Principal, quota: QuotaCall
) -> Choices:
    """Return the choices of one call, for `GenerationResponse` to run."""
    return Choices(core, requests, caller=caller, quota=quota)
