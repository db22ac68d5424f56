"""An engine's connection to an adapter store that a test scripts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import crc32c
import numpy as np
from loraplex.v1 import adapter_pb2, adapter_store_pb2, adapter_store_pb2_grpc
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, image_sha256, pack
from loraplex_common.grpc_channel import open_channel
from loraplex_engine import build
from loraplex_engine.config import EngineConfig
from loraplex_engine.loop.engine import Engine
from loraplex_engine.loop.outbox import SessionOutbox
from loraplex_engine.loop.residency_feed import ResidencyFeed
from loraplex_engine.messages import CloseSession, Ended, ResidencyChanged, Submission, Submit, WantImage
from loraplex_engine.rpc.store_client import AdapterClient, Attachment
from loraplex_engine.sampling_params import SamplingParams, StoppingParams
from support.decoder_shapes import pair_tensors
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from numpy.typing import NDArray

Request = adapter_store_pb2.AttachEngineRequest
Response = adapter_store_pb2.AttachEngineResponse
DIGEST = "ab" * 32


class ScriptedStore(adapter_store_pb2_grpc.AdapterStoreServiceServicer):
    """Sends what a test tells it to send, and records what it receives."""

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
        """Return all received messages of one kind."""
        return [getattr(request, kind) for request in self.heard if request.WhichOneof("message") == kind]

    async def next_of(self, kind: str, count: int = 1) -> Any:
        """Wait until the engine has sent ``count`` messages of a kind and return the last."""
        await eventually(lambda: len(self.all_of(kind)) >= count, what=f"{count} x {kind}")
        return self.all_of(kind)[count - 1]


@dataclass
class Line:
    """An engine, its client and the store that it is connected to."""

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
        """Have the store send a message."""
        self.store.outgoing.put_nowait(Response(**message))

    def image(self, digest: str = DIGEST) -> tuple[AdapterSpec, NDArray[np.uint8]]:
        """Return a valid image."""
        geometry = self.engine.geometry
        spec = AdapterSpec(
            digest, (ModuleSpec.low_rank(0, "q_proj", 4, 2.0), ModuleSpec.low_rank(1, "down_proj", 8, 1.0))
        )
        rng = np.random.default_rng(0)
        tensors = {}
        for layer, projection, _, rank in spec.sizes:
            inputs, outputs = geometry.projection(0, projection).shape
            a = rng.standard_normal((rank, inputs)).astype(np.float32)
            tensors[layer, projection] = (a, rng.standard_normal((outputs, rank)).astype(np.float32) * 0.1)
        return spec, pack(geometry, spec, pair_tensors(tensors))

    def offer(self, adapter: AdapterSpec, image: NDArray[np.uint8], **changes: Any) -> None:
        """Have the store offer an image."""
        fields: dict[str, Any] = {
            "digest": adapter.digest,
            "num_pages": len(image),
            "image_sha256": image_sha256(image),
            "wanted": True,
            "spec": adapter.to_json(),
        }
        self.say(offer=Response.Offer(**(fields | changes)))

    def send(
        self, image: NDArray[np.uint8], *, flip: int | None = None, checksum: int | None = None, tree_sha256: str = ""
    ) -> None:
        """Have the store send an image's bytes and report that it is filled."""
        self.send_chunks(image, flip=flip, checksum=checksum)
        self.say(filled=Response.Filled(digest=DIGEST, image_tree_sha256=tree_sha256))

    def send_chunks(self, image: NDArray[np.uint8], *, flip: int | None = None, checksum: int | None = None) -> None:
        """Have the store send an image's bytes."""
        data = bytearray(image.tobytes())
        if flip is not None:
            data[flip] ^= 1
        page_bytes = image.shape[1]
        for offset in range(0, len(data), page_bytes // 2):
            piece = bytes(data[offset : offset + page_bytes // 2])
            crc = crc32c.crc32c(piece) if checksum is None else checksum
            self.say(chunk=Response.Chunk(digest=DIGEST, offset=offset, data=piece, crc32c=crc))


def make_line(model: Path, target: str, store: ScriptedStore, *, wait_s: float) -> Line:
    """Start an engine; its client runs once the caller runs it."""
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

    (info, files), device = build.read_base_model(config), build.resolve_device(config)
    engine = Engine(
        build.engine_limits(config, info, device),
        build.runner_factory(config, info, device, files=files),
        on_store_event=hand_over,
        on_crash=lambda cause: None,
    )
    base = adapter_pb2.BaseModel(name=info.name, fingerprint=info.fingerprint)
    attachment = Attachment(engine_id="e1", base_model=base, max_image_pages=engine.limits.max_image_pages)
    client = AdapterClient(lambda: open_channel(target), engine, feed, attachment, wait_s=wait_s)
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
