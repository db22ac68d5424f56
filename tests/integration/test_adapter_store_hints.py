"""Offers of images after hints and wants: unasked, declined, dropped, or of images that are held already."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.attach.transfer import ARRIVAL_S
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.registry import hints_key
from loraplex_common.valkey import connect
from support.adapters import Recipe
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import StoreClient, running_rig, store_config, tiny_base_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_adapter_store.service import RunningStore

pytestmark = pytest.mark.integration


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[tuple[RunningStore, StoreClient]]:
    async with running_rig(store_config(redis_url)) as running:
        yield running


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


async def test_a_prefetch_hint_brings_an_image_nobody_waits_for(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo, redis_url: str
) -> None:
    digests = [(await rig[1].upload_recipe("a", Recipe(seed=s))).revision.revision for s in range(3)]
    client = connect(redis_url)
    async with attached_peer(rig[1].channel, base) as peer:
        await rig[1].stub.PrefetchAdapter(pb.PrefetchAdapterRequest(revision=digests[0], engine_id=peer.engine_id))
        await rig[1].stub.PrefetchAdapter(pb.PrefetchAdapterRequest(revision=digests[1]))
        await client.xadd(hints_key(peer.engine_id), {"kind": "prefetch", "revision": digests[2], "wanted_in_ms": 0})

        for digest in digests:
            await peer.image(digest)
            assert not (await peer.received("offer", digest)).wanted
    await client.aclose()


async def test_hints_for_unknown_engines_and_digests_are_ok(rig: tuple[RunningStore, StoreClient]) -> None:
    stub = rig[1].stub
    await stub.PrefetchAdapter(pb.PrefetchAdapterRequest(revision="ab" * 32))
    await stub.PrefetchAdapter(pb.PrefetchAdapterRequest(revision="ab" * 32, engine_id="nobody"))
    await stub.EvictAdapter(pb.AdapterStoreServiceEvictAdapterRequest(revision="ab" * 32))
    await stub.EvictAdapter(pb.AdapterStoreServiceEvictAdapterRequest(revision="ab" * 32, engine_id="nobody"))


async def test_a_declined_image_comes_when_it_is_wanted(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo
) -> None:
    digest = (await rig[1].upload_recipe("a")).revision.revision
    async with attached_peer(rig[1].channel, base) as peer:
        peer.accept_unsolicited = False
        await rig[1].stub.PrefetchAdapter(pb.PrefetchAdapterRequest(revision=digest, engine_id=peer.engine_id))
        await peer.received("offer", digest)

        peer.want(digest)

        await peer.image(digest)


async def test_a_want_turns_an_open_offer_into_a_wanted_one(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo
) -> None:
    digest = (await rig[1].upload_recipe("a")).revision.revision
    async with attached_peer(rig[1].channel, base) as peer:
        peer.auto_grant = False
        await rig[1].stub.PrefetchAdapter(pb.PrefetchAdapterRequest(revision=digest, engine_id=peer.engine_id))
        assert not (await peer.received("offer", digest)).wanted

        peer.want(digest)
        assert (await peer.received("offer", digest, count=2)).wanted
        peer.grant(digest)

        await peer.image(digest)


async def test_wants_pass_unsolicited_images(rig: tuple[RunningStore, StoreClient], base: BaseModelInfo) -> None:
    store, client = rig
    idle = [(await client.upload_recipe("idle", Recipe(seed=s, rank=32))).revision.revision for s in range(3)]
    wanted = (await client.upload_recipe("wanted", Recipe(seed=9))).revision.revision
    async with attached_peer(client.channel, base, shares_memory=False, page_bytes=4096, num_slots=1024) as peer:
        session = next(iter(store.attached._sessions.values()))
        for digest in idle:
            session.prefetch(digest)
        session.want(wanted)  # in the same step of the loop, behind the others

        await peer.image(wanted)
        order = [r.filled.digest for r in peer.log if r.WhichOneof("message") == "filled"]
        assert order == [wanted]
        for digest in idle:
            await peer.image(digest)


async def test_an_eviction_hint_becomes_a_drop(rig: tuple[RunningStore, StoreClient], base: BaseModelInfo) -> None:
    digest = (await rig[1].upload_recipe("a")).revision.revision
    async with attached_peer(rig[1].channel, base) as peer:
        await rig[1].stub.EvictAdapter(pb.AdapterStoreServiceEvictAdapterRequest(revision=digest))

        assert (await peer.received("drop")).digest == digest


async def test_an_image_that_came_and_went_between_two_reports_is_sent_again_at_once(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo
) -> None:
    digest = (await rig[1].upload_recipe("a")).revision.revision
    async with attached_peer(rig[1].channel, base) as peer:
        peer.num_to_drop = 2
        peer.want(digest)

        async with asyncio.timeout(ARRIVAL_S / 2):
            await peer.image(digest)
        assert peer.kinds().count("filled") == 3


async def test_nothing_that_the_hello_lists_is_pushed_again(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo
) -> None:
    held = (await rig[1].upload_recipe("held", Recipe(seed=1))).revision.revision
    evicted = (await rig[1].upload_recipe("evicted", Recipe(seed=2))).revision.revision
    geometry = base.geometry(dtype="float32", page_bytes=64 * 1024)
    peer = EnginePeer(base, geometry, 256, "engine-again")
    async with attached_peer(rig[1].channel, base, peer=peer):
        for digest in (held, evicted):
            peer.want(digest)
            await peer.image(digest)
    del peer.images[evicted]
    peer.log.clear()
    async with attached_peer(rig[1].channel, base, peer=peer):
        # Both are still in the store's memory, so idle room is filled with what the engine lacks, and only that.
        await peer.image(evicted)

        assert [r.offer.digest for r in peer.log if r.WhichOneof("message") == "offer"] == [evicted]
    peer.close()
