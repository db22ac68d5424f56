"""Preparation takes turns: small work never waits for large, tenants wait for each other alike, bytes are bounded."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import SaturatedError
from loraplex_gateway.text.fair_workers import SMALL_BYTES, FairWorkers

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = SMALL_BYTES + 1


@pytest.fixture
def workers() -> Iterator[FairWorkers]:
    pool = FairWorkers(2, max_bytes=16 * LARGE, max_tenant_bytes=8 * LARGE)
    yield pool
    pool.close()


async def finish(workers: FairWorkers, gate: threading.Event, *tasks: asyncio.Task[object]) -> None:
    gate.set()
    await asyncio.gather(*tasks)
    workers.check_integrity()


def spawn(workers: FairWorkers, call: object, *, tenant: str, num_bytes: int) -> asyncio.Task[object]:
    assert callable(call)
    return asyncio.create_task(workers.run(call, tenant=tenant, num_bytes=num_bytes))


async def test_small_work_does_not_wait_for_large(workers: FairWorkers) -> None:
    gate = threading.Event()
    large = [spawn(workers, gate.wait, tenant="a", num_bytes=LARGE) for _ in range(4)]
    await asyncio.sleep(0)

    async with asyncio.timeout(10):
        assert await workers.run(lambda: "done", tenant="a", num_bytes=10) == "done"

    assert not any(task.done() for task in large)
    await finish(workers, gate, *large)


async def test_tenants_take_turns_however_much_one_has_waiting(workers: FairWorkers) -> None:
    gate, order = threading.Event(), list[str]()
    first = spawn(workers, gate.wait, tenant="many", num_bytes=LARGE)
    many = [spawn(workers, lambda: order.append("many"), tenant="many", num_bytes=LARGE) for _ in range(5)]
    few = spawn(workers, lambda: order.append("few"), tenant="few", num_bytes=LARGE)
    await asyncio.sleep(0)

    await finish(workers, gate, first, *many, few)

    assert order.index("few") <= 1


async def test_more_bytes_of_one_tenant_than_its_share_are_refused_and_nobody_elses(workers: FairWorkers) -> None:
    gate = threading.Event()
    held = [spawn(workers, gate.wait, tenant="greedy", num_bytes=4 * LARGE) for _ in range(2)]
    await asyncio.sleep(0)

    with pytest.raises(SaturatedError, match="of this tenant"):
        await workers.run(gate.wait, tenant="greedy", num_bytes=LARGE)

    others = [spawn(workers, gate.wait, tenant="other", num_bytes=8 * LARGE)]
    await asyncio.sleep(0)
    with pytest.raises(SaturatedError, match="of all tenants"):
        await workers.run(gate.wait, tenant="third", num_bytes=LARGE)
    await finish(workers, gate, *held, *others)


async def test_work_nobody_waits_for_any_more_is_not_done(workers: FairWorkers) -> None:
    gate, done = threading.Event(), list[int]()
    first = spawn(workers, gate.wait, tenant="a", num_bytes=LARGE)
    second = spawn(workers, lambda: done.append(2), tenant="a", num_bytes=LARGE)
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait({second})

    await finish(workers, gate, first)

    assert done == []


async def test_what_the_work_raises_reaches_who_waits(workers: FairWorkers) -> None:
    with pytest.raises(ZeroDivisionError):
        await workers.run(lambda: 1 // 0, tenant="a", num_bytes=1)
    workers.check_integrity()
