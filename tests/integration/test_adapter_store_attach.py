"""What an engine gets from a store, over gRPC: images, refusals, hints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex.v1 import adapter_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_adapter_store.repository.keys import manifest as manifest_key
from loraplex_common.adapter_image import KIND_A, AdapterSpec, layout, tile_values
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.error_status import from_status
from loraplex_common.errors import (
    AdapterCorruptError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    InvalidParameterError,
    StoreUnavailableError,
)
from loraplex_common.valkey import connect
from support.adapters import Recipe, adapter_tensors, module_name
from support.decoder_shapes import OPS
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import (
    StoreClient,
    other_base_dir,
    refused,
    running_rig,
    store_config,
    tiny_base_dir,
    translated,
)
from support.valkey import running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_adapter_store.service import RunningStore

pytestmark = pytest.mark.integration


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[tuple[RunningStore, StoreClient]]:
    async with running_rig(store_config(redis_url)) as running:
        yield running


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


def assert_image_is(peer: EnginePeer, digest: str, recipe: Recipe, base: BaseModelInfo) -> None:
    """Compare an image that arrived with the tensors it was made of, tile by tile."""
    offer = next(r.offer for r in peer.log if r.WhichOneof("message") == "offer" and r.offer.digest == digest)
    spec = AdapterSpec.from_json(offer.spec)
    geometry = base.geometry(dtype="float32", page_bytes=peer.images[digest].shape[1])
    tensors = adapter_tensors(base, recipe)
    for module in spec.modules:
        assert module.rank == recipe.rank_of(module_name(module.layer, module.projection))
        assert module.scaling == pytest.approx(recipe.scaling_of(module_name(module.layer, module.projection)))
    num_compared = 0
    for tile in layout(geometry, spec.sizes).tiles:
        if tile["kind"] == KIND_A:
            continue
        name = OPS[tuple(OPS)[tile["op"]]][tile["slice"]]
        expected = tensors[f"base_model.model.{module_name(int(tile['layer']), name)}.lora_B.weight"]
        part = expected[tile["start"] : tile["start"] + tile["rows"]]
        np.testing.assert_array_equal(tile_values(geometry, peer.images[digest], tile), part)
        num_compared += 1
    assert num_compared >= len(spec.modules)


@pytest.mark.parametrize("shares_memory", [True, False], ids=["shared memory", "chunks"])
@pytest.mark.parametrize("page_bytes", [16 * 1024, 2 * 2**20], ids=["small pages", "2 MiB pages"])
async def test_a_wanted_image_arrives_whole(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo, shares_memory: bool, page_bytes: int
) -> None:
    _, client = rig
    recipe = Recipe(rank=8, rank_pattern={"v_proj": 3}, alpha=12)
    digest = (await client.upload_recipe("a", recipe)).revision.revision

    async with attached_peer(client.channel, base, shares_memory=shares_memory, page_bytes=page_bytes) as peer:
        peer.want(digest)
        await peer.image(digest)
        await peer.received("ack")

        assert_image_is(peer, digest, recipe, base)
        assert ("chunk" in peer.kinds()) is not shares_memory


async def test_an_engine_of_an_earlier_version_gets_a_digest_that_it_can_check(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo
) -> None:
    digest = (await rig[1].upload_recipe("a")).revision.revision
    old = EnginePeer(base, base.geometry(dtype="float32", page_bytes=64 * 1024), 256, "old")
    old.takes_tree_digests = False
    async with attached_peer(rig[1].channel, base, peer=old), attached_peer(rig[1].channel, base) as new:
        for peer in (old, new):
            peer.want(digest)

        np.testing.assert_array_equal(await old.image(digest), await new.image(digest))

        assert not (await new.received("offer", digest)).image_sha256
    old.close()


async def test_a_manifest_that_describes_another_adapter_than_its_weights_is_refused(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo, redis_url: str
) -> None:
    digest = (await rig[1].upload_recipe("a")).revision.revision
    client = connect(redis_url)
    spec = json.loads(await client.hget(manifest_key(digest), "spec") or "")
    spec["modules"][0]["scaling"] *= 2
    await client.hset(manifest_key(digest), "spec", json.dumps(spec))
    async with attached_peer(rig[1].channel, base) as peer:
        peer.want(digest)

        error = from_status((await peer.received("refuse", digest)).status)

    assert isinstance(error, AdapterCorruptError)
    assert "its manifest describes another adapter than its weights" in error.message
    await client.aclose()


async def test_an_unknown_digest_is_refused(rig: tuple[RunningStore, StoreClient], base: BaseModelInfo) -> None:
    async with attached_peer(rig[1].channel, base) as peer:
        peer.want("ab" * 32)

        refuse = await peer.received("refuse", "ab" * 32)

        assert isinstance(from_status(refuse.status), AdapterNotFoundError)


async def test_an_adapter_of_another_base_is_refused(redis_url: str, base: BaseModelInfo) -> None:
    config = store_config(redis_url, model=(tiny_base_dir(), other_base_dir()))
    async with running_rig(config) as (_, client):
        digest = (await client.upload_recipe("a", base_model="tiny")).revision.revision
        other = load_base_model(other_base_dir())
        async with attached_peer(client.channel, other) as peer:
            peer.want(digest)

            error = from_status((await peer.received("refuse")).status)

            assert isinstance(error, AdapterIncompatibleError)
            assert base.fingerprint in error.message
            assert other.fingerprint in error.message


async def test_a_rank_that_an_engine_cannot_take_is_refused_at_import(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo
) -> None:
    client = rig[1]
    async with attached_peer(client.channel, base, max_rank=8):
        await client.upload_recipe("taken", Recipe(rank=8, targets=("q_proj",)))
        with refused(
            AdapterIncompatibleError, r"layer 0 q_proj: rank 9 exceeds the 8 that the kernels of engine engine-test"
        ):
            await client.upload_recipe("refused", Recipe(rank=9, targets=("q_proj",)))
    async with attached_peer(client.channel, base, page_bytes=4096):
        with refused(AdapterIncompatibleError, "stacked rank 257: 4 x 1028 = 4112 bytes exceed a tile of 4096"):
            await client.upload_recipe("refused", Recipe(rank=257, targets=("q_proj",)))
    await client.upload_recipe("refused", Recipe(rank=257, targets=("q_proj",)))  # no engine is there to refuse it


async def test_an_image_larger_than_the_pool_is_refused_with_the_arithmetic(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo
) -> None:
    digest = (await rig[1].upload_recipe("a", Recipe(rank=16))).revision.revision
    async with attached_peer(rig[1].channel, base, page_bytes=16 * 1024, num_slots=2) as peer:
        peer.want(digest)

        error = from_status((await peer.received("refuse")).status)

        assert isinstance(error, AdapterIncompatibleError)
        assert "pages of 16384 bytes" in error.message
        assert "at most 2 pages" in error.message


async def test_a_corrupt_arrival_is_sent_once_more_then_refused(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo
) -> None:
    once = (await rig[1].upload_recipe("once", Recipe(seed=1))).revision.revision
    twice = (await rig[1].upload_recipe("twice", Recipe(seed=2))).revision.revision
    async with attached_peer(rig[1].channel, base) as peer:
        peer.num_to_spoil = 1
        peer.want(once)
        await peer.image(once)

        peer.num_to_spoil = 2
        peer.want(twice)
        error = from_status((await peer.received("refuse", twice)).status)

        assert isinstance(error, AdapterCorruptError)
        await peer.received("offer", once, count=2)
        await peer.received("offer", twice, count=2)


async def test_a_damaged_chunk_in_valkey_is_data_loss_and_heals_by_a_new_import(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo, redis_url: str
) -> None:
    digest = (await rig[1].upload_recipe("a")).revision.revision
    client = connect(redis_url)
    await client.setrange(f"a:{{{digest}}}:c:0", 5000, b"\xff\xff\xff\xff")
    async with attached_peer(rig[1].channel, base) as peer:
        peer.want(digest)
        error = from_status((await peer.received("refuse")).status)
        assert isinstance(error, AdapterCorruptError)
        assert [key async for key in client.scan_iter(f"a:{{{digest}}}*")] == []

        assert not (await rig[1].upload_recipe("a")).already_existed
        peer.want(digest)
        await peer.image(digest)
    await client.aclose()


async def test_a_missing_chunk_is_data_loss(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo, redis_url: str
) -> None:
    digest = (await rig[1].upload_recipe("a")).revision.revision
    client = connect(redis_url)
    await client.delete(f"a:{{{digest}}}:c:0")
    async with attached_peer(rig[1].channel, base) as peer:
        peer.want(digest)

        error = from_status((await peer.received("refuse")).status)

        assert isinstance(error, AdapterCorruptError)
        assert "import the adapter again" in error.message
    await client.aclose()


async def test_a_grant_that_breaks_the_protocol_ends_the_stream(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo
) -> None:
    store, client = rig
    digest = (await client.upload_recipe("a")).revision.revision
    async with attached_peer(client.channel, base) as peer:
        peer.auto_grant = False
        peer.want(digest)
        await peer.received("offer", digest)
        peer.grant(digest, (0, 0))

        await eventually(lambda: not store.attached.ids(), what="the session is gone")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"geometry": adapter_pb2.Geometry(layout_version=99)}, AdapterIncompatibleError),
        ({"arenas": [pb.AttachEngineRequest.Arena()]}, InvalidParameterError),
        ({"engine_id": "x" * 300}, InvalidParameterError),
    ],
    ids=["layout version", "arenas", "engine id"],
)
async def test_a_bad_hello_is_refused(
    rig: tuple[RunningStore, StoreClient], base: BaseModelInfo, change: dict[str, object], error: type[Exception]
) -> None:
    peer = EnginePeer(base, base.geometry(dtype="float32", page_bytes=4096), 4, "engine-bad")
    with pytest.raises(error), translated():
        await peer.run(rig[1].stub.AttachEngine(peer.requests(peer.hello(**change))))
    peer.close()


async def test_images_in_memory_are_served_while_valkey_is_down(tmp_path: Path, base: BaseModelInfo) -> None:
    with running_server(tmp_path) as server:
        async with running_rig(store_config(server.url)) as (_, client):
            warm = (await client.upload_recipe("warm", Recipe(seed=1))).revision.revision
            cold = (await client.upload_recipe("cold", Recipe(seed=2))).revision.revision
            async with attached_peer(client.channel, base, engine_id="first") as peer:
                peer.want(warm)
                await peer.image(warm)
            server.kill()
            async with attached_peer(client.channel, base, engine_id="second") as peer:
                await peer.image(warm)  # fills idle room without being asked

                peer.want(cold)
                error = from_status((await peer.received("refuse", cold)).status)
                assert isinstance(error, StoreUnavailableError)
                assert error.retry_after_s == 1.0

                server.start()
                await eventually(lambda: _arrives(peer, cold), what="the cold image arrives")


async def _arrives(peer: EnginePeer, digest: str) -> bool:
    peer.want(digest)
    try:
        await peer.received("offer", digest, timeout_s=0.5)
    except TimeoutError:
        return False
    await peer.image(digest)
    return True
