"""Digests that a manifest records save hashing, and are believed no further than the engine's own check goes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import crc32c
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.attach import filler
from loraplex_adapter_store.page_image import IMAGE, ImageKey
from loraplex_adapter_store.repository import keys
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterCorruptError
from loraplex_common.valkey import connect
from support.adapters import Recipe
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import StoreClient, refused, running_rig, store_config, tiny_base_dir
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray

pytestmark = pytest.mark.integration
PAGE_BYTES = 64 * 1024


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


@pytest.fixture
async def valkey(redis_url: str) -> AsyncIterator[Any]:
    client = connect(redis_url)
    yield client
    await client.aclose()


class Stored(NamedTuple):
    """An adapter whose image was derived by a store that has ended since."""

    digest: str
    field: str
    image: NDArray[np.uint8]


async def fetch(client: StoreClient, base: BaseModelInfo, digest: str) -> tuple[NDArray[np.uint8], list[str]]:
    """Return an image and the kinds of messages that brought it."""
    async with attached_peer(client.channel, base) as peer:
        peer.want(digest)
        image = await peer.image_or_refusal(digest)
        return image, peer.kinds()


@pytest.fixture
async def stored(redis_url: str, base: BaseModelInfo, valkey: Any) -> Stored:
    async with running_rig(store_config(redis_url, prepare_images=0)) as (_, client):
        digest = (await client.upload_recipe("a")).revision.revision
        image, _ = await fetch(client, base, digest)
    field = ImageKey(digest, base.geometry(dtype="float32", page_bytes=PAGE_BYTES), 0).field
    assert [each async for each in fields_of_images(valkey, digest)] == [field]
    return Stored(digest, field, image)


async def fields_of_images(valkey: Any, digest: str) -> AsyncIterator[str]:
    for name in await valkey.hkeys(keys.manifest(digest)):
        if name.decode().startswith(IMAGE):
            yield name.decode()


async def change_blob(valkey: Any, digest: str, **changes: Any) -> None:
    """Change facts of a manifest; None removes one."""
    blob = json.loads(await valkey.hget(keys.manifest(digest), "blob")) | changes
    kept = {name: value for name, value in blob.items() if value is not None}
    await valkey.hset(keys.manifest(digest), "blob", json.dumps(kept))


async def flip_unseen_by_crc(valkey: Any, digest: str) -> None:
    """Flip a bit of the weights, and make the chunk's checksum fit."""
    name = keys.chunk(digest, 0)
    chunk = bytearray(await valkey.get(name))
    chunk[-1] ^= 1
    await valkey.set(name, bytes(chunk))
    checksums = json.loads(await valkey.hget(keys.manifest(digest), "blob"))["crc32c"]
    await change_blob(valkey, digest, crc32c=[crc32c.crc32c(bytes(chunk)), *checksums[1:]])


async def test_an_image_derived_before_comes_with_the_digest_recorded_then(
    redis_url: str, base: BaseModelInfo, stored: Stored
) -> None:
    async with running_rig(store_config(redis_url)) as (_, client):
        image, kinds = await fetch(client, base, stored.digest)
    np.testing.assert_array_equal(image, stored.image)
    assert kinds.count("filled") == 1


async def test_a_flipped_bit_that_no_checksum_shows_is_found_by_the_engine_and_refused(
    redis_url: str, base: BaseModelInfo, stored: Stored, valkey: Any
) -> None:
    await flip_unseen_by_crc(valkey, stored.digest)
    async with running_rig(store_config(redis_url)) as (_, client):
        with refused(AdapterCorruptError, "the stored bytes have sha256"):
            await fetch(client, base, stored.digest)


async def test_a_flipped_bit_is_no_valid_image_of_an_engine_of_an_earlier_version(
    redis_url: str, base: BaseModelInfo, stored: Stored, valkey: Any
) -> None:
    await flip_unseen_by_crc(valkey, stored.digest)
    async with running_rig(store_config(redis_url)) as (_, client):
        peer = EnginePeer(base, base.geometry(dtype="float32", page_bytes=PAGE_BYTES), 256, "engine-test")
        peer.takes_tree_digests = False
        async with attached_peer(client.channel, base, peer=peer):
            peer.want(stored.digest)
            with refused(AdapterCorruptError, "the stored bytes have sha256"):
                await peer.image_or_refusal(stored.digest)
        peer.close()


async def test_a_wrong_record_of_an_image_costs_one_attempt_and_is_mended(
    redis_url: str, base: BaseModelInfo, stored: Stored, valkey: Any
) -> None:
    right = await valkey.hget(keys.manifest(stored.digest), stored.field)
    await valkey.hset(keys.manifest(stored.digest), stored.field, "0" * 64)
    async with running_rig(store_config(redis_url)) as (_, client):
        image, kinds = await fetch(client, base, stored.digest)
    np.testing.assert_array_equal(image, stored.image)
    assert kinds.count("filled") == 2
    assert await valkey.hget(keys.manifest(stored.digest), stored.field) == right


@pytest.mark.parametrize("tree", [pytest.param(None, id="none"), pytest.param("0" * 64, id="another")])
async def test_without_the_right_tree_digest_the_revisions_own_sha256_decides(
    redis_url: str, base: BaseModelInfo, stored: Stored, valkey: Any, tree: str | None
) -> None:
    await change_blob(valkey, stored.digest, tree_sha256=tree)
    await valkey.hdel(keys.manifest(stored.digest), stored.field)
    async with running_rig(store_config(redis_url)) as (_, client):
        image, _ = await fetch(client, base, stored.digest)
    np.testing.assert_array_equal(image, stored.image)
    await valkey.hdel(keys.manifest(stored.digest), stored.field)
    await flip_unseen_by_crc(valkey, stored.digest)
    async with running_rig(store_config(redis_url)) as (_, client):
        with refused(AdapterCorruptError, "the stored bytes have sha256"):
            await fetch(client, base, stored.digest)


async def test_the_tree_digest_finds_a_bit_flipped_since_the_import(
    redis_url: str, base: BaseModelInfo, stored: Stored, valkey: Any
) -> None:
    await valkey.hdel(keys.manifest(stored.digest), stored.field)
    await flip_unseen_by_crc(valkey, stored.digest)
    async with running_rig(store_config(redis_url)) as (_, client):
        with refused(AdapterCorruptError, "the stored bytes have sha256"):
            await fetch(client, base, stored.digest)
    assert [each async for each in fields_of_images(valkey, stored.digest)] == []


async def test_images_granted_together_are_filled_in_the_order_of_their_deadlines(
    redis_url: str, base: BaseModelInfo, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filler, "MAX_FINDING", 1)
    async with (
        running_rig(store_config(redis_url, prepare_images=0)) as (_, client),
        attached_peer(client.channel, base, num_slots=512) as peer,
    ):
        digests = [
            (await client.upload_recipe(f"a{number}", Recipe(seed=number))).revision.revision for number in range(6)
        ]
        peer.auto_grant = peer.accept_unsolicited = False
        for number, digest in enumerate(digests):  # the later, the more urgent
            left = Duration(seconds=100 - number)
            peer.say(want=pb.AttachEngineRequest.Want(digest=digest, time_left=left))
        await eventually(lambda: peer.kinds().count("offer") == len(digests))
        await valkey.execute_command("CLIENT", "PAUSE", 1000)  # the first is not read before all are granted
        for digest in digests:
            peer.grant(digest)
        for digest in digests:
            await peer.image(digest)
        filled = [each.filled.digest for each in peer.log if each.WhichOneof("message") == "filled"]
        assert filled == [digests[0], *reversed(digests[1:])]
