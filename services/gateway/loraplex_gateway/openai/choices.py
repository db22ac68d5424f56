"""Runs the choices of one HTTP request side by side as one stream of events."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from loraplex_common.auth import Principal

    from loraplex_gateway.quotas.calls import QuotaCall
    from loraplex_gateway.requests.core import GatewayCore
    from loraplex_gateway.types import Event, GenerationRequest


async def generate_choices(
    core: GatewayCore, requests: Sequence[GenerationRequest], *, caller: Principal, quota: QuotaCall
) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield (choice, event) until every choice has finished; the first failure ends them all.

    Raises:
        LoraplexError: What a choice was refused or failed with.
    """
    if len(requests) == 1:
        async with aclosing(core.generate(requests[0], caller=caller, time_left_s=None, quota=quota)) as events:
            async for event in events:
                yield 0, event
        return
    counted = replace(requests[0], num_choices=len(requests))
    requests = [counted, *(replace(request, num_choices=0) for request in requests[1:])]
    # One place per choice: a reader that lags holds every choice back, and the core's buffers fill instead.
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue(maxsize=len(requests))
    tasks = [
        asyncio.create_task(_run(core, choice, request, caller, quota, queue), name=f"choice-{choice}")
        for choice, request in enumerate(requests)
    ]
    try:
        async with aclosing(_merge(queue, tasks)) as items:
            async for item in items:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(
    core: GatewayCore,
    choice: int,
    request: GenerationRequest,
    caller: Principal,
    quota: QuotaCall,
    queue: asyncio.Queue[tuple[int, Event]],
) -> None:
    async with aclosing(core.generate(request, caller=caller, time_left_s=None, quota=quota)) as events:
        async for event in events:
            await queue.put((choice, event))


async def _merge(
    queue: asyncio.Queue[tuple[int, Event]], tasks: Sequence[asyncio.Task[None]]
) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield what the tasks put into the queue until all are done; raise the first failure."""
    running: set[asyncio.Task[None]] = set(tasks)
    getter = asyncio.create_task(queue.get(), name="choices-getter")
    try:
        while running or not queue.empty() or getter.done():
            await asyncio.wait({getter, *running}, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task.done()]:
                running.remove(task)
                task.result()
            if getter.done():
                yield getter.result()
                getter = asyncio.create_task(queue.get(), name="choices-getter")
    finally:
        getter.cancel()
