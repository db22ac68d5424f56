"""Pushes that end before they are whole leave nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_client import AsyncClient
from loraplex_common.errors import CancelledRequestError
from support.pushes import (
    assert_no_blob,
    attached,
    hold,
    latest,
    push_messages,
    tensors_of,
)
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_adapter_store.service import RunningStore
    from loraplex_client import AsyncAdapters
    from support.store_rig import StoreClient

pytestmark = pytest.mark.integration


async def test_a_client_that_dies_in_the_middle_leaves_nothing(
    client: StoreClient, rig: tuple[RunningStore, StoreClient], redis_url: str
) -> None:
    messages = push_messages("a", 1)
    for count in range(1, len(messages)):
        call = client.stub.PushAdapter()
        for message in messages[:count]:
            await call.write(message)
        call.cancel()

    await eventually(lambda: rig[0].importer.budget.held_bytes == 0, what="the push's memory is given back")
    assert await client.names() == []
    await assert_no_blob(redis_url)


class Lost:
    """A tensor of some shape that cannot be read when its turn comes."""

    def __init__(self, tensor: Any, during: Callable[[], object] = lambda: None) -> None:
        self.dtype, self.shape, self._during = tensor.dtype, tensor.shape, during

    def __array__(self, *_: Any, **__: Any) -> Any:
        self._during()
        raise ZeroDivisionError("the device is lost")


async def test_a_push_whose_tensor_cannot_be_read_raises_why_and_leaves_nothing(
    client: StoreClient, adapters: AsyncAdapters, rig: tuple[RunningStore, StoreClient], redis_url: str
) -> None:
    tensors, config = tensors_of(1)
    for name in (next(iter(tensors)), list(tensors)[-1]):
        with pytest.raises(ZeroDivisionError, match="the device is lost"):
            await adapters.push("a", tensors | {name: Lost(tensors[name])}, config)

    await eventually(lambda: rig[0].importer.budget.held_bytes == 0, what="the push's memory is given back")
    assert await client.names() == []
    await assert_no_blob(redis_url)
    await adapters.push("a", tensors, config)


async def test_a_push_whose_client_is_closed_says_so_and_leaves_nothing(
    client: StoreClient, rig: tuple[RunningStore, StoreClient], redis_url: str
) -> None:
    tensors, config = tensors_of(1)
    closing = AsyncClient("127.0.0.1:1", store_target=f"127.0.0.1:{rig[0].grpc_port}")
    loop = asyncio.get_running_loop()
    last = list(tensors)[-1]
    lost = Lost(tensors[last], lambda: asyncio.run_coroutine_threadsafe(closing.close(), loop).result(30))

    with pytest.raises((CancelledRequestError, ZeroDivisionError)):
        await closing.adapters.push("a", tensors | {last: lost}, config)

    await eventually(lambda: rig[0].importer.budget.held_bytes == 0, what="the push's memory is given back")
    assert await client.names() == []
    await assert_no_blob(redis_url)


async def test_a_client_that_dies_while_engines_fetch_leaves_nothing(
    client: StoreClient, adapters: AsyncAdapters, redis_url: str
) -> None:
    old = (await adapters.push("a", *tensors_of(1))).revision.digest
    async with attached(client) as peer:
        await hold(peer, old)
        peer.auto_grant = False
        pushing = asyncio.create_task(adapters.push("a", *tensors_of(2), ready_timeout_s=60))
        offer = await peer.received("offer", count=2)
        assert offer.digest != old
        pushing.cancel()

        await assert_no_blob(redis_url, but=1)
    assert await latest(client) == old
