"""A store that keeps two pushed revisions of a name, and a client of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.pushes import adapters_at
from support.store_rig import StoreClient, running_rig, store_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_adapter_store.service import RunningStore
    from loraplex_client import AsyncAdapters


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[tuple[RunningStore, StoreClient]]:
    async with running_rig(store_config(redis_url, keep_pushed_revisions=2)) as running:
        yield running


@pytest.fixture
def client(rig: tuple[RunningStore, StoreClient]) -> StoreClient:
    return rig[1]


@pytest.fixture
async def adapters(rig: tuple[RunningStore, StoreClient]) -> AsyncIterator[AsyncAdapters]:
    async with adapters_at(rig[0].grpc_port) as adapters:
        yield adapters
