"""Uploads hold what has come of them: one that announces much and sends little keeps no other out."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from loraplex_adapter_store.imports import pace
from loraplex_adapter_store.imports.budget import ImportBudget
from loraplex_adapter_store.imports.uploads import AnnouncedFile, receive
from loraplex_common.errors import DeadlineError, SaturatedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX = 1000


def make() -> ImportBudget:
    return ImportBudget(max_bytes=MAX, max_running=2, max_pending=8)


async def test_uploads_that_trickle_block_nobody() -> None:
    budget = make()
    async with AsyncExitStack() as stack:
        for _ in range(50):
            arrival = await stack.enter_async_context(budget.arrival(MAX))
            await arrival.take(1)

        async with asyncio.timeout(5), budget.arrival(900) as arrival:
            await arrival.take(900)
    budget.check_integrity()


async def test_an_upload_that_can_never_fit_is_refused_before_it_comes() -> None:
    with pytest.raises(SaturatedError):
        async with make().arrival(MAX + 1):
            pass


async def test_bytes_that_come_wait_for_room() -> None:
    budget = make()
    async with budget.arrival(MAX) as waiting:
        async with budget.arrival() as holding:
            await holding.take(600)
            taking = asyncio.create_task(waiting.take(500))
            await asyncio.sleep(0)
            assert waiting.num_bytes == 0
        await taking
        assert waiting.num_bytes == 500
    budget.check_integrity()


async def test_of_uploads_that_wait_for_each_other_the_last_gives_way() -> None:
    budget = make()
    async with budget.arrival(MAX) as first:
        async with budget.arrival(MAX) as second:
            await first.take(500)
            await second.take(500)
            growing = asyncio.create_task(first.take(200))
            await asyncio.sleep(0)
            with pytest.raises(SaturatedError):
                await second.take(200)
        await growing
        assert first.num_bytes == 700
    budget.check_integrity()


async def test_an_upload_that_hardly_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "WINDOW_S", 0.05)

    async def parts() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b"x"

    files = (AnnouncedFile(name="adapter_config.json", num_bytes=10**6, sha256=hashlib.sha256(b"").hexdigest()),)
    async with make().arrival(MAX) as arrival:
        with pytest.raises(DeadlineError, match="too slow"):
            await receive(files, parts(), arrival.take)
