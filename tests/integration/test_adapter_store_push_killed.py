"""A store that is killed at any step of a push leaves the old state or the new one, and nothing between."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import grpc
import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.checkpoint.canonical import canonicalise
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.base_model import load_base_model
from loraplex_common.grpc_channel import open_channel
from support.adapters import Recipe, adapter_files
from support.processes import ServiceProcess
from support.pushes import push_messages
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import StoreClient, tiny_base_dir
from support.valkey import running_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration
KILLS = 4


class Killed:
    """A store that a test kills and starts again over one Valkey."""

    def __init__(self, redis_url: str, log_dir: Path) -> None:
        self._redis_url = redis_url
        self._log_dir = log_dir

    @asynccontextmanager
    async def started(self) -> AsyncIterator[tuple[ServiceProcess, StoreClient]]:
        """Run it; it is killed at the end of the block at the latest."""
        flags = ["--model", str(tiny_base_dir()), "--redis-url", self._redis_url, "--port", "0", "--metrics-port", "0"]
        store = ServiceProcess("loraplex_adapter_store", flags, log_dir=self._log_dir).wait_ready()
        try:
            async with open_channel(store.grpc) as channel:
                yield store, StoreClient(channel=channel)
        finally:
            if store.is_running:
                store.kill()


async def check(client: StoreClient, allowed: set[str]) -> str:
    """Return what the name means; it must be one of some revisions, alone, and an engine must get it whole."""
    found = (await client.get("a")).revision.revision
    listed = await client.stub.ListAdapterRevisions(pb.ListAdapterRevisionsRequest(name="a"))
    revisions = [each.revision for each in listed.revisions]
    assert found in allowed
    assert revisions[0] == found
    async with attached_peer(client.channel, load_base_model(tiny_base_dir())) as peer:
        for digest in revisions:
            peer.want(digest)
            await peer.image(digest)
    return found


async def push_until_killed(
    client: StoreClient, store: ServiceProcess, peer: EnginePeer, old: str, number: int, rng: random.Random
) -> None:
    """Begin a push after the old revision and kill the store at one of its steps."""
    messages = push_messages("a", number, expected=old, ready_timeout_s=60.0)
    call = client.stub.PushAdapter()
    with suppress(grpc.aio.AioRpcError):  # its store is killed
        if number % KILLS == 0:  # while bytes come
            await call.write(messages[0])
            await call.write(messages[1])
            await asyncio.to_thread(store.kill)
        elif number % KILLS == 1:  # while the engine fetches
            peer.auto_grant = False
            for message in messages:
                await call.write(message)
            await peer.received("offer", count=2)
            await asyncio.to_thread(store.kill)
        else:  # anywhere from the last byte to the answer
            for message in messages:
                await call.write(message)
            await call.done_writing()
            await asyncio.sleep(rng.uniform(0, 0.06))
            await asyncio.to_thread(store.kill)
        await call


async def test_a_killed_store_leaves_the_old_revision_or_the_new_one_whole(tmp_path: Path) -> None:
    rng = random.Random(7)
    with running_server(tmp_path / "valkey") as server:
        killed = Killed(server.url, tmp_path)
        async with killed.started() as (_, client):
            response = await client.stub.PushAdapter(iter(push_messages("a", 100)))
            revision, allowed = response.revision.revision, {response.revision.revision}
        for number in range(KILLS):
            async with killed.started() as (store, client):
                revision = await check(client, allowed)
                async with attached_peer(client.channel, load_base_model(tiny_base_dir())) as peer:
                    await peer.image(revision)  # brought unasked, as the store has just made it
                    await push_until_killed(client, store, peer, revision, number, rng)
            # Only a push whose bytes are all there, and which waits for no engine, may have been stored.
            allowed = {revision} if number % KILLS < 2 else {revision, digest_of(number)}
        async with killed.started() as (_, client):
            revision = await check(client, allowed)
            again = await client.stub.PushAdapter(iter(push_messages("a", 200, expected=revision)))
            assert await check(client, {again.revision.revision})


def digest_of(number: int) -> str:
    """Return the revision that a push's tensors have."""
    files = adapter_files(tiny_base_dir(), Recipe(seed=number))
    base = load_base_model(tiny_base_dir())
    checkpoint = read_checkpoint(files["adapter_config.json"], files["adapter_model.safetensors"], base)
    return canonicalise(checkpoint).revision
