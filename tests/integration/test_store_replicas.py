"""Several stores on one Valkey: what one acknowledges, the gateways of all know."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from google.longrunning import operations_pb2
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store import aliases, watchers
from loraplex_adapter_store.imports.intake import _ID_CHARS
from loraplex_adapter_store.records import Position
from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.catalog import Catalog
from loraplex_adapter_store.watchers import Watchers
from loraplex_common.auth import Principal, Role
from loraplex_common.error_status import to_status
from loraplex_common.errors import InvalidParameterError, StoreUnavailableError
from loraplex_common.valkey import connect
from support.adapters import Recipe, write_adapter
from support.store_rig import (
    StoreClient,
    new_id,
    refused,
    running_rig,
    set_alias,
    store_config,
    tiny_base_dir,
    translated,
)
from support.valkey import running_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration


class Gateway:
    """A gateway that reads its stream and acknowledges when a test says so.

    Args:
        client: Client of the replica that serves the stream.
        said_to: Client of the replica that gets the acknowledgements.
    """

    def __init__(self, client: StoreClient, said_to: StoreClient, name: str = "gateway-1") -> None:
        self.name = name
        self.said_to = said_to
        self._call = client.stub.WatchAliases(pb.WatchAliasesRequest(watcher_id=name))

    async def read(self) -> pb.WatchAliasesResponse:
        """Return the next message."""
        message: pb.WatchAliasesResponse = await asyncio.wait_for(self._call.read(), 10)
        return message

    async def acknowledge(self, message: pb.WatchAliasesResponse) -> None:
        """Say that a message has been taken in."""
        request = pb.AcknowledgeAliasesRequest(
            watcher_id=self.name, history_id=message.history_id, sequence=message.sequence
        )
        await self.said_to.stub.AcknowledgeAliases(request)

    def close(self) -> None:
        """End the stream."""
        self._call.cancel()


@asynccontextmanager
async def two_replicas(redis_url: str) -> AsyncIterator[tuple[StoreClient, StoreClient]]:
    """Run two stores on one Valkey."""
    async with AsyncExitStack() as stack:
        rigs = [await stack.enter_async_context(running_rig(store_config(redis_url))) for _ in range(2)]
        yield rigs[0][1], rigs[1][1]


async def test_a_change_is_answered_once_the_gateways_of_all_replicas_have_taken_it_in(redis_url: str) -> None:
    async with two_replicas(redis_url) as (first, second):
        gateway = Gateway(second, said_to=first)
        await gateway.acknowledge(await gateway.read())
        upload = asyncio.create_task(first.upload_recipe("a", Recipe(seed=1)))
        told = await gateway.read()
        await asyncio.sleep(0.1)
        assert not upload.done(), "answered although a gateway of another replica has not taken it in"
        await gateway.acknowledge(told)
        answer = await upload
        assert list(answer.visibility.gateways) == [gateway.name]
        assert not answer.visibility.late_gateways
        assert answer.visibility.timeout.seconds == aliases.FOLLOW_S
        moved = asyncio.create_task(set_alias(second, "a", "prod", answer.revision.revision))
        gateway.said_to = second
        await gateway.acknowledge(await gateway.read())
        assert list((await moved).visibility.gateways) == [gateway.name]
        gateway.close()


async def test_a_repeated_call_waits_for_gateways_as_its_first_one_did(redis_url: str) -> None:
    async with two_replicas(redis_url) as (first, second):
        request_id = new_id()
        await first.upload_recipe("a", Recipe(seed=1), request_id=request_id)
        gateway = Gateway(second, said_to=second)
        table = await gateway.read()
        again = asyncio.create_task(second.upload_recipe("a", Recipe(seed=1), request_id=request_id))
        await asyncio.sleep(0.1)
        assert not again.done()
        await gateway.acknowledge(table)
        assert list((await again).visibility.gateways) == [gateway.name]
        gateway.close()


async def test_a_gateway_that_says_nothing_is_named_in_the_answer_when_the_time_is_over(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aliases, "FOLLOW_S", 0.5)
    async with two_replicas(redis_url) as (first, second):
        silent, heard = Gateway(second, first, "silent"), Gateway(first, first, "heard")
        await silent.read()
        await heard.acknowledge(await heard.read())
        upload = asyncio.create_task(first.upload_recipe("a", Recipe(seed=1)))
        await heard.acknowledge(await heard.read())
        answer = await upload
        assert (list(answer.visibility.gateways), list(answer.visibility.late_gateways)) == (["heard"], ["silent"])
        assert answer.visibility.timeout.ToMilliseconds() == 500
        silent.close()
        heard.close()


async def test_a_gateway_that_has_gone_is_not_waited_for(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((watchers, "LEASE_S"), (aliases, "FOLLOW_S")):
        monkeypatch.setattr(module, name, 120.0)
    async with two_replicas(redis_url) as (first, second):
        gateway = Gateway(second, said_to=first)
        await gateway.read()
        upload = asyncio.create_task(first.upload_recipe("a", Recipe(seed=1)))
        await gateway.read()
        gateway.close()
        async with asyncio.timeout(30):  # a fraction of either wait
            assert not (await upload).visibility.late_gateways


async def test_a_gateway_that_comes_back_through_another_replica_keeps_its_lease_when_the_old_stream_ends(
    redis_url: str,
) -> None:
    async with two_replicas(redis_url) as (first, second):
        old = Gateway(first, said_to=first)
        await old.read()
        new = Gateway(second, said_to=second)
        await new.acknowledge(await new.read())
        old.close()
        await asyncio.sleep(0.2)
        upload = asyncio.create_task(first.upload_recipe("a", Recipe(seed=1)))
        told = await new.read()
        await asyncio.sleep(0.1)
        assert not upload.done()
        await new.acknowledge(told)
        assert list((await upload).visibility.gateways) == [new.name]
        new.close()


async def test_the_lease_of_a_gateway_ends_soon_after_its_replica_has_died(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchers, "LEASE_S", 0.3)
    client: Any = connect(redis_url)
    dead, alive = Watchers(client), Watchers(client)
    watch = dead.watching("gateway-1")
    await watch.__aenter__()  # never ends, and nothing renews it
    began = time.monotonic()
    visibility = await alive.wait(Position("history", 1), 30.0)
    assert not visibility.late, "it was waited for to the end"
    assert time.monotonic() - began > 0.2
    await client.aclose()


async def test_all_parts_of_a_large_change_are_there_when_its_position_is(redis_url: str) -> None:
    async with two_replicas(redis_url) as (first, _):
        await first.upload_recipe("a", Recipe(seed=1))
        start = await Gateway(first, first, "").read()
        for number in range(120):
            await first.stub.CreateAdapter(pb.CreateAdapterRequest(adapter=adapter_pb2.Adapter(name=f"n{number}")))
        request = pb.WatchAliasesRequest(start_sequence=start.sequence, start_history_id=start.history_id)
        watch = first.stub.WatchAliases(request)
        sequences = [(await watch.read()).sequence for _ in range(3)]
        watch.cancel()
        assert sequences[0] == sequences[1] == start.sequence < sequences[2]


async def test_an_import_that_an_outage_of_valkey_has_failed_is_done_when_it_is_repeated_at_another_replica(
    tmp_path: Path,
) -> None:
    folder = write_adapter(tmp_path / "root" / "a", tiny_base_dir(), Recipe(seed=1))
    with running_server(tmp_path / "valkey") as server:
        valkey: Any = connect(server.url)
        configs = [store_config(server.url, import_root=(tmp_path / "root",)) for _ in range(2)]
        async with running_rig(configs[0]) as (_, first), running_rig(configs[1]) as (_, second):
            request = pb.ImportAdapterRequest(name="a", uri=folder.as_uri(), request_id=new_id())
            await first.wait(await first.stub.ImportAdapter(request))
            failed = pb.ImportAdapterRequest(name="b", uri=folder.as_uri(), request_id=new_id())
            name = hashlib.sha256(failed.request_id.encode()).hexdigest()[:_ID_CHARS]
            error = to_status(StoreUnavailableError("Valkey was away", retry_after_s=1.0))
            ended = operations_pb2.Operation(name=f"operations/{name}", done=True, error=error)
            await valkey.set(keys.operation(name), ended.SerializeToString())
            again = await asyncio.gather(first.stub.ImportAdapter(failed), second.stub.ImportAdapter(failed))
            results = [await first.wait(each) for each in again]
            assert results[0].revision == results[1].revision
            assert await second.names() == ["a", "b"]
        await valkey.aclose()


@pytest.mark.parametrize("name", ["a b", "x" * 129, "a/b", "ü", "a\n"])
async def test_a_name_that_is_none_is_refused(redis_url: str, name: str) -> None:
    async with two_replicas(redis_url) as (first, _):
        for call in (
            first.stub.WatchAliases(pb.WatchAliasesRequest(watcher_id=name)).read(),
            first.stub.AcknowledgeAliases(pb.AcknowledgeAliasesRequest(watcher_id=name)),
            first.stub.AcknowledgeAliases(pb.AcknowledgeAliasesRequest()),
            first.stub.AcknowledgeAliases(pb.AcknowledgeAliasesRequest(watcher_id="g", history_id="x" * 257)),
            first.stub.AcknowledgeAliases(pb.AcknowledgeAliasesRequest(watcher_id="g", sequence=2**64 - 1)),
        ):
            with refused(InvalidParameterError, "watcher_id|letters|history_id|characters"), translated():
                await call
        assert not (await first.upload_recipe("a", Recipe(seed=1))).visibility.late_gateways


async def test_a_replica_that_stood_still_for_longer_than_changes_are_kept_reads_all_anew(redis_url: str) -> None:
    async with running_rig(store_config(redis_url)) as (_, client), connect(redis_url) as valkey:
        catalog = Catalog(valkey, gc_grace_s=60.0, check_name=lambda _: None)
        table = aliases.AliasTable(valkey, catalog, (), Watchers(valkey))
        await table._turn()
        uploads = [await client.upload_recipe(name, Recipe(seed=seed)) for seed, name in enumerate("abc")]
        await valkey.xtrim(keys.CHANGES, maxlen=1, approximate=False)

        await table._turn()

        assert set(table.revisions(Principal(name="admin", role=Role.ADMIN))) == {
            each.revision.revision for each in uploads
        }
