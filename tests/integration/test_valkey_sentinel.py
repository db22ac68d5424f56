"""Valkey behind Sentinels: a primary that dies is replaced, and nothing that was acknowledged is lost; no cluster."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from loraplex_adapter_store.service import running_store
from loraplex_common.errors import StoreUnavailableError
from loraplex_common.valkey import connect
from loraplex_common.valkey_client import UnservedValkeyError, refuse_cluster
from loraplex_common.valkey_errors import ValkeyRefusedError
from loraplex_common.valkey_sentinel import SentinelPool
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import SentinelManagedSSLConnection
from support.adapters import Recipe
from support.sentinels import (
    PASSWORD,
    PRIMARY,
    SENTINEL_PASSWORD,
    WatchedValkey,
    free_port,
    valkey_server,
    watched_valkey,
)
from support.store_rig import refused, running_rig, store_config
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from loraplex_common.valkey import TranslatingClient

pytestmark = pytest.mark.integration
STORE_PASSWORDS = {"redis_password": PASSWORD, "redis_sentinel_password": SENTINEL_PASSWORD}


@asynccontextmanager
async def closing(client: TranslatingClient) -> AsyncIterator[TranslatingClient]:
    yield client
    await client.aclose()


async def succeeds(call: Callable[[], Awaitable[object]]) -> bool:
    """Make a call until it is answered, within the time of `eventually`."""

    async def is_answered() -> bool:
        try:
            await call()
        except StoreUnavailableError:
            return False
        return True

    await eventually(is_answered)
    return True


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[WatchedValkey]:
    with watched_valkey(tmp_path / "valkey") as running:
        yield running


async def test_a_store_goes_on_at_the_new_primary_and_has_what_it_acknowledged(
    watched: WatchedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_rig(store_config(watched.url, **STORE_PASSWORDS)) as (_, client):
        first = (await client.upload_recipe("a", Recipe(seed=1), label="prod")).revision.revision
        watched.kill_primary()
        await eventually(lambda: watched.role(watched.ports[1]) == "master")

        assert await succeeds(lambda: client.get("a:prod"))
        assert (await client.get("a:prod")).revision.revision == first
        # The new primary has no replica, on which a change has to be before it is acknowledged.
        monkeypatch.setattr("loraplex_adapter_store.repository.on_disk.FSYNC_TIMEOUT_S", 0.1)
        with refused(StoreUnavailableError, r"on disk: 0 of 1 replicas have \(--redis-replicas\)"):
            await client.upload_recipe("b", Recipe(seed=2))


async def test_sentinels_and_servers_ask_for_passwords_of_their_own(watched: WatchedValkey) -> None:
    async with closing(connect(watched.url, password=PASSWORD)) as client:
        with pytest.raises(StoreUnavailableError):
            await client.get("key")
    async with closing(connect(watched.url, sentinel_password=SENTINEL_PASSWORD)) as client:
        with pytest.raises(ValkeyRefusedError, match="Valkey wants a password"):
            await client.get("key")


async def test_many_commands_at_once_reach_the_primary_that_sentinels_know(watched: WatchedValkey) -> None:
    client = connect(watched.url, password=PASSWORD, sentinel_password=SENTINEL_PASSWORD)
    async with closing(client):
        assert await asyncio.gather(*(client.incr("calls") for _ in range(150)))


async def test_tls_goes_to_the_sentinels_and_to_the_primary() -> None:
    async with closing(connect(f"rediss-sentinel://s1,s2/0#{PRIMARY}")) as client:
        pool = client.connection_pool
        assert isinstance(pool, SentinelPool)
        assert issubclass(pool.connection_class, SentinelManagedSSLConnection)
        assert all(
            issubclass(each.connection_pool.connection_class, SSLConnection) for each in pool.sentinel_manager.sentinels
        )


async def test_sentinels_that_know_no_such_primary_are_named(watched: WatchedValkey) -> None:
    async with closing(
        connect(watched.url.replace(f"#{PRIMARY}", "#other"), password=PASSWORD, sentinel_password=SENTINEL_PASSWORD)
    ) as client:
        with pytest.raises(StoreUnavailableError, match="no Sentinel of --redis-url knows a primary of that name"):
            await client.get("key")


async def test_a_cluster_is_refused_by_name(tmp_path: Path) -> None:
    with valkey_server(tmp_path / "cluster", "cluster-enabled yes", f"cluster-port {free_port()}") as (port, _):
        url = f"redis://127.0.0.1:{port}/0"
        with pytest.raises(UnservedValkeyError, match="a cluster is not served: name a single Valkey"):
            async with running_store(store_config(url)):
                pass
        async with closing(connect(url)) as client:
            with pytest.raises(ValkeyRefusedError, match="a cluster is not served"):
                await client.set("key", "value")


async def test_a_valkey_that_does_not_answer_is_not_taken_for_a_cluster() -> None:
    async with closing(connect("redis://127.0.0.1:1/0")) as client:
        await refuse_cluster(client)
