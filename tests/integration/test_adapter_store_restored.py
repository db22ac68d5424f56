"""Valkey comes back with an earlier state: what it has now is told and served, and nothing acknowledged since is lost."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

import pytest
import structlog
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.alias_feed import AdapterEntry, AliasFeed
from loraplex_common.errors import LoraplexError, SequenceGapError
from loraplex_common.peers import PeerChannel, Peers
from support.adapters import Recipe
from support.store_rig import StoreClient, refused, running_rig, store_config, translated
from support.valkey import running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration


class Table:
    """What a gateway knows."""

    def __init__(self) -> None:
        self.labels: dict[str, dict[str, str]] = {}

    def replacing(self, entries: Iterable[AdapterEntry]) -> Iterator[None]:
        self.labels = {entry.name: dict(entry.labels) for entry in entries}
        yield

    def update(self, entries: Iterable[AdapterEntry]) -> None:
        self.labels |= {entry.name: dict(entry.labels) for entry in entries}


async def move(client: StoreClient, revision: str) -> None:
    """Move a:prod; acknowledged once this returns."""
    alias = adapter_pb2.Alias(name="a", label="prod", revision=revision)

    async def is_moved() -> bool:
        try:
            with translated():
                await client.stub.SetAlias(pb.SetAliasRequest(alias=alias))
        except LoraplexError:
            return False  # Valkey is on its way back
        return True

    await eventually(is_moved)


def back_up(server: EmbeddedValkey, data_dir: Path, backup: Path) -> None:
    server.stop()
    shutil.copytree(data_dir / "appendonlydir", backup)
    server.start()


def restore(server: EmbeddedValkey, data_dir: Path, backup: Path) -> None:
    """End the server and put the earlier state in place of the present one."""
    server.kill()
    shutil.rmtree(data_dir / "appendonlydir")
    shutil.copytree(backup, data_dir / "appendonlydir")


@pytest.mark.parametrize("pause_s", [0.0, 3.0], ids=["at once", "after an outage"])
async def test_moves_after_valkey_came_back_with_an_earlier_state_are_served(tmp_path: Path, pause_s: float) -> None:
    data_dir, backup, table = tmp_path / "valkey", tmp_path / "backup", Table()
    with running_server(data_dir) as server:
        async with running_rig(store_config(server.url, gc_grace_s=600.0)) as (store, client):
            channel = PeerChannel(Peers(), f"127.0.0.1:{store.grpc_port}")
            feed = asyncio.create_task(AliasFeed(channel, [table]).run())
            first, second = [(await client.upload_recipe("a", Recipe(seed=n))).revision.revision for n in (1, 2)]
            await move(client, first)
            back_up(server, data_dir, backup)
            for revision in (second, first, second, first, second):
                await move(client, revision)
            await client.upload_recipe("later", Recipe(seed=3))
            await eventually(lambda: table.labels["a"]["prod"] == second and "later" in table.labels)

            with structlog.testing.capture_logs() as lines:
                restore(server, data_dir, backup)
                await asyncio.sleep(pause_s)
                server.start()
                await eventually(lambda: table.labels.get("a", {}).get("prod") == first and "later" not in table.labels)

                await move(client, second)
                await eventually(lambda: table.labels["a"]["prod"] == second, timeout_s=2)
            assert any("went back to an earlier state" in line["event"] for line in lines)
            feed.cancel()


async def test_a_move_right_after_the_restore_is_told_before_it_is_acknowledged(tmp_path: Path) -> None:
    data_dir, backup = tmp_path / "valkey", tmp_path / "backup"
    with running_server(data_dir) as server:
        async with running_rig(store_config(server.url, gc_grace_s=600.0)) as (_, client):
            first, second = [(await client.upload_recipe("a", Recipe(seed=n))).revision.revision for n in (1, 2)]
            back_up(server, data_dir, backup)
            for revision in (second, first, second, first):
                await move(client, revision)
            restore(server, data_dir, backup)
            server.start()

            await move(client, second)

            watch = client.stub.WatchAliases(pb.WatchAliasesRequest())
            told = {alias.label: alias.revision for entry in (await watch.read()).entries for alias in entry.aliases}
            watch.cancel()
            assert told["prod"] == second


async def test_a_position_of_another_history_is_refused_though_its_sequence_would_do(valkey_url: str) -> None:
    async with running_rig(store_config(valkey_url)) as (_, client):
        await client.upload_recipe("a", Recipe(seed=1))
        watch = client.stub.WatchAliases(pb.WatchAliasesRequest())
        told = await watch.read()
        watch.cancel()
        request = pb.WatchAliasesRequest(start_sequence=told.sequence, start_history_id="another")

        with refused(SequenceGapError, "another history"), translated():
            await client.stub.WatchAliases(request).read()
