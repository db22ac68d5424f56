"""The engine's line to the store against a scripted store: chunks, corruption, refusals, reconnects."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import crc32c
import pytest
from grpc import aio
from loraplex.v1 import adapter_pb2, adapter_store_pb2_grpc
from loraplex_common.error_status import from_status, to_status
from loraplex_common.errors import (
    AdapterCorruptError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    LoraplexError,
    RequestTooLargeError,
    StoreUnavailableError,
)
from loraplex_common.tree_digest import tree_sha256
from support.adapter_line import DIGEST, Line, Response, ScriptedStore, close, make_line
from support.base_models import write_base_model
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_common.adapter_image import AdapterSpec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("client") / "tiny")


@pytest.fixture
async def line(model: Path) -> AsyncIterator[Line]:
    store = ScriptedStore()  # type: ignore[abstract]  # one RPC of many
    server = aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(store, server)
    await server.start()
    line = make_line(model, f"127.0.0.1:{port}", store, wait_s=60.0)
    task = asyncio.create_task(line.client.run())
    await eventually(lambda: line.client.is_attached)
    yield line
    await close(line, task)
    await server.stop(None)


async def test_the_hello_describes_the_arena_and_what_is_held(line: Line) -> None:
    (hello,) = line.store.hellos

    assert (hello.engine_id, hello.max_image_pages) == ("e1", line.engine.arena.num_slots)
    assert hello.geometry.page_bytes == line.engine.limits.page_bytes
    assert hello.arenas[0].num_slots == hello.arenas[0].num_free == line.engine.arena.num_slots
    assert hello.arenas[0].nonce == line.engine.arena.nonce
    assert not hello.held


def tiers(line: Line) -> list[int]:
    """Where the store has heard the adapter to be, in order."""
    return [residency.held.tier for residency in line.store.all_of("residency")]


async def test_a_miss_is_wanted_filled_in_chunks_verified_and_used(line: Line) -> None:
    spec, image = line.image()

    line.submit()
    want = await line.store.next_of("want")
    line.offer(spec, image)
    grant = await line.store.next_of("grant")
    line.send(image)
    end = await line.end()

    assert (want.digest, grant.digest, len(set(grant.slots))) == (DIGEST, DIGEST, len(image))
    assert end.error is None
    arena, device = adapter_pb2.TIER_ARENA, adapter_pb2.TIER_DEVICE
    await eventually(lambda: device in tiers(line), what="residency events travel beside the outputs")
    on_the_way = tiers(line)[: tiers(line).index(device)]
    assert set(on_the_way) <= {arena, adapter_pb2.TIER_UNSPECIFIED}, "what changes between two reports is one message"


@pytest.mark.parametrize("fault", ["a flipped bit", "a wrong checksum", "a page too many"])
async def test_a_corrupt_transfer_is_reported_and_may_come_again(line: Line, fault: str) -> None:
    spec, image = line.image()
    line.submit()
    await line.store.next_of("want")

    line.offer(spec, image)
    await line.store.next_of("grant")
    if fault == "a flipped bit":
        line.send(image, flip=5)
    elif fault == "a wrong checksum":
        line.send(image, checksum=1)
    else:
        data = bytes(16)
        beyond = Response.Chunk(digest=DIGEST, offset=image.nbytes, data=data, crc32c=crc32c.crc32c(data))
        line.say(chunk=beyond)
    await eventually(lambda: any(residency.HasField("error") for residency in line.store.all_of("residency")))
    line.offer(spec, image)
    await line.store.next_of("grant", count=2)
    line.send(image)

    (failure,) = [residency for residency in line.store.all_of("residency") if residency.HasField("error")]
    assert isinstance(from_status(failure.error), AdapterCorruptError)
    assert (await line.end()).error is None


@pytest.mark.parametrize("is_right", [True, False], ids=["right", "of another image"])
async def test_an_image_is_checked_against_the_tree_digest_that_comes_when_it_is_filled(
    line: Line, is_right: bool
) -> None:
    spec, image = line.image()
    line.submit()
    await line.store.next_of("want")

    line.offer(spec, image, image_sha256="")
    await line.store.next_of("grant")
    line.send(image, tree_sha256=tree_sha256(image) if is_right else tree_sha256(image + 1))

    if is_right:
        assert (await line.end()).error is None
        return
    await eventually(lambda: any(residency.HasField("error") for residency in line.store.all_of("residency")))
    line.offer(spec, image)
    await line.store.next_of("grant", count=2)
    line.send(image)  # from a store of an earlier version, whose digest comes with the offer
    assert (await line.end()).error is None


def spec_of(module: object) -> dict[str, bytes]:
    """Return an offer's spec with one module that no version writes."""
    return {"spec": json.dumps({"digest": DIGEST, "modules": [module]}).encode()}


@pytest.mark.parametrize(
    "change",
    [
        {"num_pages": 2},
        {"rank": 1},
        {"spec": b"no json"},
        {"spec": b"\xff\xff"},
        spec_of("ab"),
        spec_of({"layer": 0, "projection": "q_proj"}),
        spec_of({"layer": 0, "projection": "q_proj", "rank": 4, "scaling": 1.0, "parts": None}),
        spec_of({"layer": 0, "projection": "q_proj", "parts": {"of_a_newer_version": {}}}),
    ],
    ids=str,
)
async def test_an_offer_that_does_not_fit_its_spec_is_corrupt(line: Line, change: dict[str, Any]) -> None:
    spec, image = line.image()
    line.submit()
    await line.store.next_of("want")

    line.offer(spec, image, **change)

    await eventually(lambda: any(residency.HasField("error") for residency in line.store.all_of("residency")))
    assert not line.store.all_of("grant")


async def test_an_image_that_can_never_fit_ends_the_request_with_the_arithmetic(line: Line) -> None:
    spec, image = line.image()
    line.submit()
    await line.store.next_of("want")

    line.offer(spec, image, num_pages=10_000)

    error = (await line.end()).error
    assert isinstance(error, RequestTooLargeError)
    assert "10000 pages" in error.message


async def test_an_adapter_the_backend_cannot_compute_is_declined_before_it_travels(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_spec: AdapterSpec) -> None:
        raise AdapterIncompatibleError("layer 0: ranks exceed 256")

    monkeypatch.setattr(line.engine, "check_adapter", refuse)
    line.submit()
    await line.store.next_of("want")

    line.offer(*line.image())

    error = (await line.end()).error
    assert isinstance(error, AdapterIncompatibleError)
    assert error.message == "layer 0: ranks exceed 256"
    assert not line.store.all_of("grant")


async def test_a_refusal_ends_the_request_with_the_stores_error(line: Line) -> None:
    line.submit()
    await line.store.next_of("want")

    line.say(refuse=Response.Refuse(digest=DIGEST, status=to_status(AdapterNotFoundError("no such revision"))))

    error = (await line.end()).error
    assert isinstance(error, AdapterNotFoundError)
    assert error.message == "no such revision"


async def test_a_repeated_offer_does_not_take_slots_twice(line: Line) -> None:
    spec, image = line.image()

    line.offer(spec, image, wanted=False)
    await line.store.next_of("grant")
    line.offer(spec, image, wanted=True)
    line.send(image)

    await eventually(lambda: [event.digest for event in line.feed.held] == [DIGEST])
    assert len(line.store.all_of("grant")) == 1
    assert line.engine.arena.num_free == line.engine.arena.num_slots - len(image)


async def test_what_is_wanted_is_asked_for_again_after_a_reconnect(line: Line) -> None:
    spec, image = line.image()
    line.submit()
    await line.store.next_of("want")
    line.offer(spec, image)
    await line.store.next_of("grant")

    line.store.outgoing.put_nowait(None)  # the stream ends half-way
    await line.store.next_of("want", count=2)
    line.offer(spec, image)
    await line.store.next_of("grant", count=2)
    line.send(image)

    assert (await line.end()).error is None
    assert len(line.store.hellos) == 2


async def test_images_held_are_in_the_hello_after_a_reconnect(line: Line) -> None:
    spec, image = line.image()
    line.offer(spec, image, wanted=False)
    await line.store.next_of("grant")
    line.send(image)
    await eventually(lambda: line.feed.resident)

    line.store.outgoing.put_nowait(None)
    await eventually(lambda: len(line.store.hellos) == 2)

    (held,) = line.store.hellos[1].held
    assert (held.digest, held.tier) == (DIGEST, adapter_pb2.TIER_DEVICE)  # idle room keeps it warm
    assert line.store.hellos[1].sequence == line.feed.sequence


async def test_a_store_that_lost_track_gets_the_whole_truth_again(line: Line) -> None:
    line.say(ack=Response.Ack(sequence=line.feed.sequence, num_held=3))

    await eventually(lambda: len(line.store.hellos) == 2)


async def test_a_drop_takes_the_image_away(line: Line) -> None:
    spec, image = line.image()
    line.offer(spec, image, wanted=False)
    await line.store.next_of("grant")
    line.send(image)
    await eventually(lambda: line.feed.held)

    line.say(drop=Response.Drop(digest=DIGEST))

    await eventually(lambda: not line.feed.held)
    assert line.engine.arena.num_free == line.engine.arena.num_slots


async def test_requests_learn_that_the_store_stays_away(model: Path) -> None:
    line = make_line(model, "127.0.0.1:1", ScriptedStore(), wait_s=0.5)  # type: ignore[abstract]
    task = asyncio.create_task(line.client.run())
    began_s = time.monotonic()

    line.submit()
    error = (await line.end()).error

    assert isinstance(error, StoreUnavailableError)
    assert isinstance(error, LoraplexError)
    assert error.retry_after_s is not None
    assert time.monotonic() - began_s >= 0.4
    await close(line, task)


@asynccontextmanager
async def impatient(model: Path, monkeypatch: pytest.MonkeyPatch, wait_s: float = 0.5) -> AsyncIterator[Line]:
    """Yield a line to a scripted store that is given up after a silence of `wait_s`."""
    monkeypatch.setattr("loraplex_engine.rpc.store_silence.LEAST_S", 0.0)
    store = ScriptedStore()  # type: ignore[abstract]  # one RPC of many
    server = aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(store, server)
    await server.start()
    line = make_line(model, f"127.0.0.1:{port}", store, wait_s=wait_s)
    task = asyncio.create_task(line.client.run())
    await eventually(lambda: line.client.is_attached)
    try:
        yield line
    finally:
        await close(line, task)
        await server.stop(None)


async def test_a_connected_store_that_does_not_answer_is_given_up_and_dialled_anew(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with impatient(model, monkeypatch) as line:
        line.submit()
        await line.store.next_of("want")
        error = (await line.end()).error

        assert isinstance(error, StoreUnavailableError)
        assert error.retry_after_s is not None
        assert "has not answered for" in error.message
        await eventually(lambda: len(line.store.hellos) == 2)
        await eventually(lambda: line.client.is_attached)
        spec, image = line.image()
        line.submit()
        await line.store.next_of("want", 2)
        line.offer(spec, image)
        await line.store.next_of("grant")
        line.send(image)
        assert (await line.end()).error is None


async def test_a_store_that_stops_in_the_middle_of_an_image_is_given_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with impatient(model, monkeypatch) as line:
        spec, image = line.image()
        line.submit()
        await line.store.next_of("want")
        line.offer(spec, image)
        await line.store.next_of("grant")

        assert isinstance((await line.end()).error, StoreUnavailableError)
        await eventually(lambda: len(line.store.hellos) == 2)


async def test_a_store_that_owes_nothing_or_goes_on_speaking_is_kept(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with impatient(model, monkeypatch, wait_s=0.5) as line:
        await asyncio.sleep(1.2)  # longer than a silence may last
        line.submit()
        await line.store.next_of("want")
        for _ in range(8):
            line.say(ack=Response.Ack(sequence=0))
            await asyncio.sleep(0.2)
        spec, image = line.image()
        line.offer(spec, image)
        await line.store.next_of("grant")
        line.send(image)

        assert (await line.end()).error is None
        assert len(line.store.hellos) == 1
