"""Two stores whose engines want the same image at once: one derives it, and the other has its pages."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_adapter_store import images
from loraplex_adapter_store.derivation import Derivation
from loraplex_adapter_store.page_image import ImageKey
from loraplex_adapter_store.repository import derivation_leases
from loraplex_common.base_model import load_base_model
from loraplex_common.valkey import connect
from support.adapters import Recipe
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import StoreClient, running_rig, store_config, tiny_base_dir

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = pytest.mark.integration
PAGE_BYTES = 64 * 1024


class Slow(Derivation):
    """A derivation that takes its time, and is counted."""

    count = 0

    async def run(self, *args: Any) -> str:
        Slow.count += 1
        await asyncio.sleep(0.3)
        return await super().run(*args)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    Slow.count = 0
    monkeypatch.setattr(images, "Derivation", Slow)


async def fetch(client: StoreClient, digest: str, engine_id: str) -> NDArray[Any]:
    base = load_base_model(tiny_base_dir())
    peer = EnginePeer(base, base.geometry(dtype="float32", page_bytes=PAGE_BYTES), 256, engine_id)
    peer.accept_unsolicited = False
    async with attached_peer(client.channel, base, peer=peer):
        peer.want(digest)
        image = await peer.image(digest)
    peer.close()
    return image


async def two_fetches(redis_url: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Have two replicas bring the same image to an engine each at once."""
    async with AsyncExitStack() as stack:
        clients = [(await stack.enter_async_context(running_rig(store_config(redis_url))))[1] for _ in range(2)]
        digest = (await clients[0].upload_recipe("a", Recipe(seed=1))).revision.revision
        first, second = await asyncio.gather(*(fetch(each, digest, f"engine-{n}") for n, each in enumerate(clients)))
    return first, second


async def test_of_two_replicas_one_derives_and_both_engines_get_the_image(redis_url: str) -> None:
    first, second = await two_fetches(redis_url)

    assert (first == second).all()
    assert Slow.count == 1


async def test_nothing_is_put_into_valkey_where_no_other_replica_waits(redis_url: str) -> None:
    async with running_rig(store_config(redis_url)) as (_, client):
        digest = (await client.upload_recipe("a", Recipe(seed=1))).revision.revision
        await fetch(client, digest, "engine-0")
    valkey: Any = connect(redis_url)
    assert not await valkey.keys("loraplex:store:deriving:*")
    await valkey.aclose()


async def test_damaged_pages_of_another_replica_are_not_taken(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivation_leases, "tree_sha256", lambda pages: "another")
    monkeypatch.setattr(derivation_leases, "WAIT_S", 1.0)
    first, second = await two_fetches(redis_url)

    assert (first == second).all()
    assert Slow.count == 2


async def test_a_lease_whose_holder_has_died_costs_no_more_than_its_rest(redis_url: str) -> None:
    valkey: Any = connect(redis_url)
    async with running_rig(store_config(redis_url)) as (_, client):
        digest = (await client.upload_recipe("a", Recipe(seed=1))).revision.revision
        geometry = load_base_model(tiny_base_dir()).geometry(dtype="float32", page_bytes=PAGE_BYTES)
        name = derivation_leases._name(ImageKey(digest, geometry, 0))
        await valkey.set(derivation_leases._lease(name), "of the dead", px=500)
        began = time.monotonic()
        await fetch(client, digest, "engine-0")
        assert 0.3 < time.monotonic() - began < 3.0
    await valkey.aclose()


async def test_a_holder_that_takes_too_long_is_not_waited_for(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivation_leases, "WAIT_S", 0.1)
    first, second = await two_fetches(redis_url)

    assert (first == second).all()
    assert Slow.count == 2
