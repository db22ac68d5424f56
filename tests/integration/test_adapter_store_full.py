"""A Valkey that is full, or takes no writes at all: the store says so, stays, and goes on once there is room."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.repository import garbage
from loraplex_adapter_store.repository.engines import HINTS_TTL_S, EngineHoldings
from loraplex_common.errors import SaturatedError, StoreUnavailableError
from loraplex_common.registry import hints_key
from loraplex_common.valkey import connect
from support.adapters import Recipe
from support.store_rig import StoreClient, refused, running_rig, store_config
from support.valkey import running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


async def delete(client: StoreClient, name: str) -> None:
    await client.stub.DeleteAdapter(pb.DeleteAdapterRequest(name=name))


async def num_blob_keys(valkey: Any) -> int:
    return len(await valkey.keys("a:*"))


async def test_deleting_adapters_makes_room_in_a_full_valkey_as_the_refusal_says(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        valkey = connect(server.url)
        async with running_rig(store_config(server.url)) as (_, client):
            await client.upload_recipe("old", Recipe(seed=1))
            await valkey.config_set("maxmemory", 1)
            with refused(SaturatedError, "delete adapters or raise its maxmemory"):
                await client.upload_recipe("new", Recipe(seed=2))

            await delete(client, "old")

            async def is_empty() -> bool:
                return await num_blob_keys(valkey) == 0

            await eventually(is_empty)
            await valkey.config_set("maxmemory", 0)
            await client.upload_recipe("new", Recipe(seed=2))
            assert await client.names() == ["new"]
        await valkey.aclose()


async def test_a_store_whose_valkey_takes_no_writes_goes_on_and_collects_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(garbage, "SETTLE_S", 0.1)
    with running_server(tmp_path) as server:
        valkey = connect(server.url)
        async with running_rig(store_config(server.url, gc_grace_s=0.5)) as (store, client):
            serving = asyncio.create_task(store.supervisor.run_until(asyncio.Event()))
            await client.upload_recipe("kept", Recipe(seed=1))
            await client.upload_recipe("gone", Recipe(seed=2))
            num_kept = await num_blob_keys(valkey) // 2
            await delete(client, "gone")
            await valkey.config_set("min-replicas-to-write", 1)  # writes are refused, as on a full disk
            with refused(StoreUnavailableError, "too few replicas"):
                await client.upload_recipe("new", Recipe(seed=3))
            await asyncio.sleep(1.0)  # garbage is due, several times
            assert await client.names() == ["kept"]
            assert not serving.done()

            await valkey.config_set("min-replicas-to-write", 0)

            async def is_collected() -> bool:
                return await num_blob_keys(valkey) == num_kept

            await eventually(is_collected)
            await client.upload_recipe("new", Recipe(seed=3))
            assert await client.names() == ["kept", "new"]
            serving.cancel()
        await valkey.aclose()


async def test_hints_for_an_engine_that_died_leave_valkey(valkey_url: str) -> None:
    valkey = connect(valkey_url)

    await EngineHoldings(valkey).hint("dead", "evict", "ab" * 32)

    assert 0 < await valkey.ttl(hints_key("dead")) <= HINTS_TTL_S
    await valkey.aclose()


async def test_what_an_engine_holds_is_known_while_valkey_is_full(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        valkey = connect(server.url)
        await valkey.config_set("maxmemory", 1)
        holdings = EngineHoldings(valkey)

        await holdings.publish("e1", {"ab" * 32: 2})
        assert await holdings.leases() == {"ab" * 32: 2}

        await holdings.publish("e1", {})
        assert await holdings.leases() == {}
        await valkey.aclose()
