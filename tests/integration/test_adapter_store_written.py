"""A store that writes into shared memory names the pages that are written, so that they are hashed while others come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_common.base_model import BaseModelInfo, load_base_model
from support.store_engine_peer import EnginePeer, attached_peer
from support.store_rig import StoreClient, running_rig, store_config, tiny_base_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGE_BYTES = 16 * 1024


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[StoreClient]:
    async with running_rig(store_config(redis_url)) as (_, client):
        yield client


async def test_each_page_is_named_before_the_image_is_filled(client: StoreClient, base: BaseModelInfo) -> None:
    digest = (await client.upload_recipe("a")).revision.revision

    for source in ("derived", "host memory"):
        peer = EnginePeer(base, base.geometry(dtype="float32", page_bytes=PAGE_BYTES), 256, source)
        peer.accept_unsolicited = False
        async with attached_peer(client.channel, base, peer=peer):
            peer.want(digest)
            image = await peer.image(digest)

            kinds = [kind for kind in peer.kinds() if kind in ("written", "filled")]
            assert kinds == [*["written"] * (len(kinds) - 1), "filled"], source
            assert peer.num_written[digest] == len(image) > 1, source
        peer.close()


async def test_a_bit_that_flips_in_a_named_page_is_found_and_the_image_comes_again(
    client: StoreClient, base: BaseModelInfo
) -> None:
    digest = (await client.upload_recipe("a")).revision.revision

    async with attached_peer(client.channel, base, page_bytes=PAGE_BYTES) as peer:
        peer.num_to_flip = 1
        peer.want(digest)
        image = await peer.image(digest)

        assert peer.kinds().count("filled") == 2
        assert peer.num_written[digest] == 2 * len(image)


async def test_an_engine_that_does_not_take_the_names_of_pages_gets_none(
    client: StoreClient, base: BaseModelInfo
) -> None:
    digest = (await client.upload_recipe("a")).revision.revision
    old = EnginePeer(base, base.geometry(dtype="float32", page_bytes=PAGE_BYTES), 256, "old")
    old.takes_written = False

    async with attached_peer(client.channel, base, peer=old):
        old.want(digest)
        await old.image(digest)

        assert "written" not in old.kinds()
    old.close()
