"""An engine hashes the pages that its store says are written, against a scripted store that writes them as chunks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from grpc import aio
from loraplex.v1 import adapter_store_pb2_grpc
from loraplex_common.error_status import from_status
from loraplex_common.errors import AdapterCorruptError
from loraplex_common.tree_digest import tree_sha256
from support.adapter_line import DIGEST, Line, Response, ScriptedStore, close, make_line
from support.base_models import write_base_model
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import numpy as np
    from loraplex_common.adapter_image import AdapterSpec
    from numpy.typing import NDArray

Wanted = tuple["AdapterSpec", "NDArray[np.uint8]"]


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    store = ScriptedStore()  # type: ignore[abstract]  # one RPC of many
    server = aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(store, server)
    await server.start()
    line = make_line(write_base_model(tmp_path / "tiny"), f"127.0.0.1:{port}", store, wait_s=60.0)
    task = asyncio.create_task(line.client.run())
    await eventually(lambda: line.client.is_attached)
    yield line
    await close(line, task)
    await server.stop(None)


@pytest.fixture
async def wanted(line: Line) -> Wanted:
    """Return an image for which slots are granted."""
    spec, image = line.image()
    line.submit()
    await line.store.next_of("want")
    line.offer(spec, image, image_sha256="")
    await line.store.next_of("grant")
    return spec, image


def say_written(line: Line, *pages: int) -> None:
    line.say(written=Response.Written(digest=DIGEST, pages=pages))


def say_filled(line: Line, image: NDArray[np.uint8]) -> None:
    line.say(filled=Response.Filled(digest=DIGEST, image_tree_sha256=tree_sha256(image)))


def failures(line: Line) -> list[AdapterCorruptError]:
    found = [from_status(each.error) for each in line.store.all_of("residency") if each.HasField("error")]
    assert all(isinstance(error, AdapterCorruptError) for error in found)
    return [error for error in found if isinstance(error, AdapterCorruptError)]


def damaged(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image with a flipped bit in its first page."""
    other = image.copy()
    other[0, 5] ^= 1
    return other


async def test_an_engine_asks_to_be_told_of_pages(line: Line) -> None:
    assert line.store.hellos[0].takes_written


async def test_an_image_some_of_whose_pages_were_named_is_used(line: Line, wanted: Wanted) -> None:
    _, image = wanted

    line.send_chunks(image)
    say_written(line, 0)
    say_filled(line, image)

    assert (await line.end()).error is None
    assert not failures(line)


async def test_a_page_that_is_written_and_named_again_is_hashed_anew(line: Line, wanted: Wanted) -> None:
    _, image = wanted

    line.send_chunks(damaged(image))
    say_written(line, *range(len(image)))
    line.send_chunks(image)
    say_written(line, 0)
    say_filled(line, image)

    assert (await line.end()).error is None
    assert not failures(line)


async def test_damage_in_a_page_that_was_named_is_found(line: Line, wanted: Wanted) -> None:
    spec, image = wanted

    line.send_chunks(damaged(image))
    say_written(line, *range(len(image)))
    say_filled(line, image)
    await eventually(lambda: bool(failures(line)), what="the damage is reported")
    line.offer(spec, image, image_sha256="")
    await line.store.next_of("grant", count=2)
    line.send_chunks(image)
    say_filled(line, image)

    assert (await line.end()).error is None, "digests of the first attempt are not those of the second"
    assert "sha256 is" in failures(line)[0].message


async def test_a_page_that_the_image_has_not_is_refused(line: Line, wanted: Wanted) -> None:
    spec, image = wanted

    say_written(line, len(image))
    await eventually(lambda: bool(failures(line)), what="the page is reported")
    line.offer(spec, image, image_sha256="")
    await line.store.next_of("grant", count=2)
    line.send_chunks(image)
    say_filled(line, image)

    assert (await line.end()).error is None
    assert f"page {len(image)} of {len(image)} is said to be written" in failures(line)[0].message
