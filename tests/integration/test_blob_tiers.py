"""Canonical blobs in two tiers behind each other: a damaged or lost chunk comes from the next one."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

import crc32c
import pytest
from loraplex_adapter_store.checkpoint.canonical import CHUNK_BYTES, CanonicalForm
from loraplex_adapter_store.repository import keys
from loraplex_adapter_store.repository.blob_tier import ValkeyTier
from loraplex_adapter_store.repository.blobs import Blobs
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec
from loraplex_common.errors import AdapterCorruptError, StoreUnavailableError
from loraplex_common.text_parts import TextParts
from loraplex_common.valkey import connect
from support.valkey import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration
REVISION = "ab" * 32
DATA = bytes(range(256)) * (CHUNK_BYTES * 5 // 2 // 256)
FORM = CanonicalForm(
    revision=REVISION,
    base_fingerprint="cd" * 32,
    spec=AdapterSpec(REVISION, (ModuleSpec.low_rank(0, "q_proj", 8, 2.0),)),
    num_parameters=1,
    num_bytes=len(DATA),
    pieces=(memoryview(DATA),),
    text_parts=TextParts(),
)


class Rig(NamedTuple):
    near: keys.Client
    far: keys.Client
    blobs: Blobs


@pytest.fixture
async def rig(store_valkey: EmbeddedValkey) -> AsyncIterator[Rig]:
    """Blobs whose manifests and nearest tier are in one database, and whose farthest tier is in another."""
    async with AsyncExitStack() as stack:
        near, far = (connect(fresh_database(store_valkey)) for _ in range(2))
        for client in (near, far):
            stack.push_async_callback(client.aclose)
        blobs = Blobs(near, (ValkeyTier(near), ValkeyTier(far)))
        await blobs.put(FORM)
        yield Rig(near, far, blobs)


async def content(blobs: Blobs) -> bytes:
    manifest = await blobs.manifest(REVISION)
    assert manifest is not None
    async with aclosing(blobs.read(REVISION, manifest)) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def test_a_blob_in_the_form_of_earlier_versions_is_read(store_valkey: EmbeddedValkey) -> None:
    client = connect(fresh_database(store_valkey))
    sums = [crc32c.crc32c(DATA[start : start + 2**21]) for start in range(0, len(DATA), 2**21)]
    shape = {"bytes": len(DATA), "chunk_bytes": 2**21, "crc32c": sums}
    spec = {"digest": REVISION, "modules": [{"layer": 0, "projection": "q_proj", "rank": 8, "scaling": 2.0}]}
    fields: dict[Any, Any] = {"blob": json.dumps(shape), "base": FORM.base_fingerprint, "spec": json.dumps(spec)}
    await client.hset(f"a:{{{REVISION}}}:m", mapping=fields)
    for number in range(len(sums)):
        await client.set(f"a:{{{REVISION}}}:c:{number}", DATA[number * 2**21 : (number + 1) * 2**21])

    assert await content(Blobs(client)) == DATA
    await client.aclose()


async def test_a_chunk_that_is_lost_and_one_that_is_damaged_come_from_the_next_tier(rig: Rig) -> None:
    await rig.near.delete(keys.chunk(REVISION, 0))
    await rig.near.setrange(keys.chunk(REVISION, 1), 77, b"\x00")

    assert await content(rig.blobs) == DATA
    assert await rig.blobs.is_complete(REVISION)


async def test_a_chunk_that_no_tier_has_ends_the_blob_in_both(rig: Rig) -> None:
    await rig.near.setrange(keys.chunk(REVISION, 2), 77, b"\x00")
    await rig.far.delete(keys.chunk(REVISION, 2))

    with pytest.raises(AdapterCorruptError, match=r"chunk 2 of 3 has a wrong crc32c in redis, is missing in redis"):
        await content(rig.blobs)

    assert await rig.near.dbsize() == await rig.far.dbsize() == 0


async def test_a_tier_that_is_away_is_no_reason_to_delete_a_blob(rig: Rig) -> None:
    away = connect("redis://127.0.0.1:1/0")
    blobs = Blobs(rig.near, (ValkeyTier(rig.near), ValkeyTier(away)))
    assert await content(blobs) == DATA

    await rig.near.delete(keys.chunk(REVISION, 2))
    with pytest.raises(StoreUnavailableError):
        await content(blobs)

    assert await rig.blobs.is_complete(REVISION)
    await away.aclose()
