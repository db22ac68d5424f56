"""Crashes of the store and of Valkey lose nothing that was acknowledged."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import LoraplexError
from loraplex_common.grpc_channel import open_channel
from support.adapters import Recipe, write_adapter
from support.processes import ServiceProcess
from support.store_engine_peer import attached_peer
from support.store_rig import StoreClient, tiny_base_dir
from support.valkey import running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration


@asynccontextmanager
async def running_store(
    redis_url: str, log_dir: Path, *arguments: str
) -> AsyncIterator[tuple[ServiceProcess, StoreClient]]:
    """Run a store that ends with the block: in order if the block has not ended it, at once if the block failed."""
    flags = ["--model", str(tiny_base_dir()), "--redis-url", redis_url, "--port", "0", "--metrics-port", "0"]
    store = ServiceProcess("loraplex_adapter_store", [*flags, *arguments], log_dir=log_dir).wait_ready()
    try:
        async with open_channel(store.grpc) as channel:
            yield store, StoreClient(channel=channel)
    except BaseException:
        store.kill()
        raise
    assert not store.is_running or store.stop() == 0, store.log()


async def test_killing_store_and_valkey_loses_nothing_imported(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "root" / "b", tiny_base_dir(), Recipe(seed=2))
    with running_server(tmp_path / "valkey") as server:
        async with running_store(server.url, tmp_path, "--import-root", str(tmp_path / "root")) as (store, client):
            first = (await client.upload_recipe("a", Recipe(seed=1), label="prod")).revision
            second = (await client.import_dir("b", folder)).revision
            server.kill()  # right after the acknowledgement: what was acknowledged is on disk
            store.kill()

        server.start()
        async with running_store(server.url, tmp_path) as (_, client):
            assert (await client.get("a:prod")).revision == first
            assert (await client.get("b")).revision == second
            async with attached_peer(client.channel, load_base_model(tiny_base_dir())) as peer:
                for revision in (first, second):
                    peer.want(revision.revision)
                    await peer.image(revision.revision)


async def test_a_store_outlives_a_crash_of_valkey(tmp_path: Path) -> None:
    with running_server(tmp_path / "valkey") as server:
        async with running_store(server.url, tmp_path) as (_, client):
            await client.upload_recipe("a", Recipe(seed=1))
            server.kill()
            with pytest.raises(LoraplexError):
                await client.upload_recipe("b", Recipe(seed=2))
            server.start()

            async def is_imported() -> bool:
                try:
                    await client.upload_recipe("b", Recipe(seed=2))
                except LoraplexError:
                    return False
                return True

            await eventually(is_imported)
            watch = client.stub.WatchAliases(pb.WatchAliasesRequest())
            told = {entry.name for entry in (await watch.read()).entries}
            watch.cancel()
            assert told == {"a", "b"}, "acknowledged before gateways can know"
            assert await client.names() == ["a", "b"]


async def test_a_store_starts_while_valkey_is_away(tmp_path: Path) -> None:
    with running_server(tmp_path / "valkey") as server:
        server.kill()
        async with running_store(server.url, tmp_path) as (_, client):
            server.start()

            async def answers() -> bool:
                try:
                    return await client.names() == []
                except LoraplexError:
                    return False

            await eventually(answers)


def test_bad_configuration_ends_with_a_message(tmp_path: Path) -> None:
    store = ServiceProcess(
        "loraplex_adapter_store", ["--model", str(tmp_path), "--redis-url", "redis://127.0.0.1:1"], log_dir=tmp_path
    )
    assert store.wait() == 2
    assert "config.json" in store.log()
