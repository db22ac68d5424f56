"""The engine's line to the store against a scripted store: chunks, corruption, refusals, reconnects."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import crc32c
import numpy as np
import pytest
from grpc import aio
from loraplex.v1 import adapter_pb2, adapter_store_pb2, adapter_store_pb2_grpc
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, image_sha256, pack
from loraplex_common.errors import (
    AdapterCorruptError,
    AdapterIncompatibleError,
    AdapterNotFoundError,
    LoraplexError,
    RequestTooLargeError,
    StoreUnavailableError,
    from_status,
    to_status,
)
from loraplex_engine import building
from loraplex_engine.adapter_client import AdapterClient, Attachment
from loraplex_engine.config import EngineConfig
from loraplex_engine.engine import Engine
from loraplex_engine.messages import (
    CloseSession,
    Ended,
    ResidencyChanged,
    SamplingParams,
    StoppingParams,
    Submission,
    Submit,
    WantImage,
)
from loraplex_engine.outbox import SessionOutbox
from loraplex_engine.residency_feed import ResidencyFeed
from support.base_models import write_base_model
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from numpy.typing import NDArray

Request = adapter_store_pb2.AttachEngineRequest
Response = adapter_store_pb2.AttachEngineResponse
DIGEST = "ab" * 32


class ScriptedStore(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """Says what a test tells it to say, and writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[Request] = []
        self.hellos: list[Request.Hello] = []
        self.outgoing: asyncio.Queue[Response | None] = asyncio.Queue()

    async def AttachEngine(self, request_iterator: Any, context: Any) -> AsyncIterator[Response]:  # noqa: N802
        self.outgoing = asyncio.Queue()
        reader = asyncio.create_task(self._listen(request_iterator))
        yield Response(welcome=Response.Welcome(store_id="scripted", shared_memory=[False]))
        while (message := await self.outgoing.get()) is not None:
            yield message
        reader.cancel()

    async def _listen(self, requests: AsyncIterator[Request]) -> None:
        async for request in requests:
            if request.HasField("hello"):
                self.hellos.append(request.hello)
            else:
                self.heard.append(request)

    def all_of(self, kind: str) -> list[Any]:
        """Return everything of one kind that was heard."""
        return [getattr(request, kind) for request in self.heard if request.WhichOneof("message") == kind]

    async def next_of(self, kind: str, count: int = 1) -> Any:
        """Wait until the engine has said something of a kind ``count`` times and return the last."""
        await eventually(lambda: len(self.all_of(kind)) >= count, what=f"{count} x {kind}")
        return self.all_of(kind)[count - 1]


@dataclass
class Line:
    """An engine, its client and the store it talks to."""

    engine: Engine
    feed: ResidencyFeed
    store: ScriptedStore
    outbox: SessionOutbox
    client: AdapterClient
    ended: list[Ended] = field(default_factory=list)

    def submit(self, digest: str = DIGEST) -> None:
        """Submit a request that needs an adapter."""
        self.engine.post(
            Submit(
                Submission(
                    session_id=self.outbox.session_id,
                    session_slot=0,
                    request_id="r",
                    prompt_token_ids=np.array([5, 6, 7], dtype=np.int32),
                    resumed_token_ids=np.empty(0, dtype=np.int32),
                    sampling=SamplingParams(temperature=0.0),
                    stopping=StoppingParams(max_new_tokens=2, ignore_eos=True),
                    adapter_digest=digest,
                )
            )
        )

    async def end(self) -> Ended:
        """Wait for the request's end."""
        async with asyncio.timeout(20):
            while (outputs := await self.outbox.next()) is not None:
                for event in outputs.events:
                    if isinstance(event, Ended):
                        return event
        raise AssertionError("the session ended")

    def say(self, **message: Any) -> None:
        """Let the store send a message."""
        self.store.outgoing.put_nowait(Response(**message))

    def image(self, digest: str = DIGEST) -> tuple[AdapterSpec, NDArray[np.uint8]]:
        """Return a valid image."""
        geometry = self.engine.params.geometry
        spec = AdapterSpec(digest, (ModuleSpec(0, "q_proj", 4, 2.0), ModuleSpec(1, "down_proj", 8, 1.0)))
        rng = np.random.default_rng(0)
        tensors = {}
        for layer, projection, rank in spec.ranks:
            inputs, outputs = geometry.projection_shape(projection)
            a = rng.standard_normal((rank, inputs)).astype(np.float32)
            tensors[layer, projection] = (a, rng.standard_normal((outputs, rank)).astype(np.float32) * 0.1)
        return spec, pack(geometry, spec, tensors)

    def offer(self, adapter: AdapterSpec, image: NDArray[np.uint8], **changes: Any) -> None:
        """Let the store offer an image."""
        fields: dict[str, Any] = {
            "digest": adapter.digest,
            "num_pages": len(image),
            "image_sha256": image_sha256(image),
            "wanted": True,
            "spec": adapter.to_json(),
        }
        self.say(offer=Response.Offer(**(fields | changes)))

    def send(self, image: NDArray[np.uint8], *, flip: int | None = None, checksum: int | None = None) -> None:
        """Let the store send an image's bytes and say that it is filled."""
        data = bytearray(image.tobytes())
        if flip is not None:
            data[flip] ^= 1
        page_bytes = image.shape[1]
        for offset in range(0, len(data), page_bytes // 2):
            piece = bytes(data[offset : offset + page_bytes // 2])
            crc = crc32c.crc32c(piece) if checksum is None else checksum
            self.say(chunk=Response.Chunk(digest=DIGEST, offset=offset, data=piece, crc32c=crc))
        self.say(filled=Response.Filled(digest=DIGEST))


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


def make_line(model: Path, target: str, store: ScriptedStore, *, wait_s: float) -> Line:
    config = EngineConfig(model=model, pool_bytes=2**19, arena_bytes=2**18, num_threads=1, max_model_len=64)
    loop, feed = asyncio.get_running_loop(), ResidencyFeed(100)
    lines: list[Line] = []

    def hand_over(event: WantImage | ResidencyChanged) -> None:
        loop.call_soon_threadsafe(on_store_event, event)

    def on_store_event(event: WantImage | ResidencyChanged) -> None:
        if isinstance(event, WantImage):
            lines[0].client.want(event)
        else:
            feed.append(event)
            lines[0].client.changed(event)

    info, device = building.read_base_model(config), building.resolve_device(config)
    engine = Engine(
        building.engine_params(config, info, device),
        building.runner_factory(config, info, device),
        on_store_event=hand_over,
        on_crash=lambda cause: None,
    )
    base = adapter_pb2.BaseModel(name=info.name, fingerprint=info.fingerprint)
    attachment = Attachment(engine_id="e1", base_model=base, max_image_pages=building.max_image_pages(engine.params))
    client = AdapterClient(target, engine, feed, attachment, wait_s=wait_s)
    lines.append(Line(engine, feed, store, engine.open_session(), client))
    return lines[0]


async def close(line: Line, task: asyncio.Task[None]) -> None:
    """Shut a line down and check that no slot and no page is lost."""
    line.engine.post(CloseSession(line.outbox.session_id))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.wrap_future(line.engine.check_integrity())
    held = sum(event.num_pages for event in line.feed.held)
    assert line.engine.arena.num_free == line.engine.arena.num_slots - held
    await asyncio.to_thread(line.engine.close)


async def test_the_hello_describes_the_arena_and_what_is_held(line: Line) -> None:
    (hello,) = line.store.hellos

    assert (hello.engine_id, hello.max_image_pages) == ("e1", line.engine.arena.num_slots)
    assert hello.geometry.page_bytes == line.engine.params.geometry.page_bytes
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
    way = [adapter_pb2.TIER_ARENA, adapter_pb2.TIER_DEVICE]
    await eventually(lambda: set(way) <= set(tiers(line)), what="residency events travel beside the outputs")
    assert sorted(way, key=tiers(line).index) == way


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


@pytest.mark.parametrize("change", [{"spec": b"no json"}, {"num_pages": 2}, {"rank": 1}])
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
