"""A store beside a newer one, whose adapters may have parts of kinds that it does not know."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.blobs import Blobs
from loraplex_common.base_model import load_base_model
from loraplex_common.error_status import from_status
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.valkey import connect
from support.store_engine_peer import attached_peer
from support.store_rig import running_rig, store_config, tiny_base_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[keys.Client]:
    client = connect(redis_url)
    yield client
    await client.aclose()


async def give_newer_part(client: keys.Client, digest: str) -> None:
    """Make an adapter's manifest one that a newer version wrote."""
    spec = json.loads(await client.hget(keys.manifest(digest), "spec") or "")
    spec["modules"][0]["parts"] = {"of_a_newer_version": {}}
    await client.hset(keys.manifest(digest), "spec", json.dumps(spec))


async def test_an_adapter_with_an_unknown_part_is_refused_by_name(redis_url: str, client: keys.Client) -> None:
    async with running_rig(store_config(redis_url)) as (_, store):
        digest = (await store.upload_recipe("a")).revision.revision
        await give_newer_part(client, digest)
        async with attached_peer(store.channel, load_base_model(tiny_base_dir())) as peer:
            peer.want(digest)

            error = from_status((await peer.received("refuse", digest)).status)

    assert isinstance(error, AdapterIncompatibleError)
    assert "part kind 'of_a_newer_version' is not one of low_rank, " in error.message
    assert error.message.endswith(": upgrade the older side")


async def test_an_adapter_with_an_unknown_part_can_be_collected(redis_url: str, client: keys.Client) -> None:
    async with running_rig(store_config(redis_url)) as (_, store):
        digest = (await store.upload_recipe("a")).revision.revision
    await give_newer_part(client, digest)

    await Blobs(client).delete(digest)

    assert not await client.exists(keys.manifest(digest), keys.chunk(digest, 0))
