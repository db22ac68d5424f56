"""The digest of an image whose pages are hashed as they are written."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.adapter_image import image_sha256
from loraplex_common.tree_digest import tree_sha256
from loraplex_engine.rpc.image_check import ImageCheck

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

SLOTS = (4, 1, 3)


@pytest.fixture
def check() -> Iterator[ImageCheck]:
    check = ImageCheck()
    yield check
    check.close()


@pytest.fixture
def arena() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 3 << 20), dtype=np.uint8)


async def test_the_digest_is_that_of_the_pages_in_order_whichever_were_named_first(
    check: ImageCheck, arena: NDArray[np.uint8]
) -> None:
    image = check.begin(arena, SLOTS)

    image.add((2,))
    image.add((0,))

    assert await image.tree_sha256() == tree_sha256(arena[list(SLOTS)])
    assert await image.sha256() == image_sha256(arena[list(SLOTS)])


async def test_a_page_that_was_named_is_read_once_and_again_only_if_it_is_named_again(
    check: ImageCheck, arena: NDArray[np.uint8]
) -> None:
    image, before = check.begin(arena, SLOTS), tree_sha256(arena[list(SLOTS)])
    image.add(range(3))
    assert await image.tree_sha256() == before

    arena[SLOTS[1], 0] ^= 1

    assert await image.tree_sha256() == before
    image.add((1,))
    assert await image.tree_sha256() == tree_sha256(arena[list(SLOTS)]) != before


async def test_pages_that_no_thread_has_begun_with_are_left_when_the_image_is_given_up(
    check: ImageCheck, arena: NDArray[np.uint8]
) -> None:
    image = check.begin(arena, SLOTS * 40)
    image.add(range(3 * 40))

    image.cancel()

    with pytest.raises(asyncio.CancelledError):
        await image.tree_sha256()
