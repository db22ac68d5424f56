"""The engine's connection to the adapter store: wants and residency go up, page images come down.

The engine connects, and reconnects for as long as it lives. A stream starts with the full state (arena, images held),
so only what is still wanted has to survive a broken stream. The step loop never waits for the store: it posts a
`WantImage` and gets an `ImageArrived` or an `ImageRefused`.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import grpc
from loraplex.v1 import adapter_pb2, adapter_store_pb2, adapter_store_pb2_grpc
from loraplex_common import geometry_wire
from loraplex_common.error_status import from_status, to_status
from loraplex_common.errors import LoraplexError, StoreUnavailableError
from loraplex_common.kept_status import KeptStatus
from loraplex_common.log import get_logger
from loraplex_common.reconnect import keep_connected
from loraplex_common.tasks import cancel_and_wait

from loraplex_engine.messages import DropAdapter, ImageRefused, ResidencyChanged, ResidencyState, WantImage
from loraplex_engine.rpc import store_wire
from loraplex_engine.rpc.image_transfer import ImageTransfers, TransferCallbacks
from loraplex_engine.rpc.store_silence import LOOK_S, StoreSilence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Any

    from loraplex_engine.loop.engine import Engine
    from loraplex_engine.loop.residency_feed import ResidencyFeed

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 2.0
RETRY_AFTER_S: Final = 2.0
REPORT_PAUSE_S: Final = 0.005
"""Seconds between two reports of residency: an adapter that comes and goes in between is one message."""

_Request = adapter_store_pb2.AttachEngineRequest
_Response = adapter_store_pb2.AttachEngineResponse
_Call: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"
_log = get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """What an engine tells a store about itself.

    Attributes:
        engine_id: The name under which hints reach the engine.
        max_image_pages: Pages of the largest image that the pool can ever hold.
        max_rank: Largest rank of one projection that the kernels take; 0 if only the tiles limit it.
        max_added_tokens: Tokens that an adapter may add behind the base's vocabulary.
    """

    engine_id: str
    base_model: adapter_pb2.BaseModel
    max_image_pages: int
    max_rank: int = 0
    max_added_tokens: int = 0


class AdapterClient:
    """Client of ``AttachEngine``; `run` it as a task. Lives on the asyncio loop.

    Args:
        dial: Opens a channel to the store.
        engine: The engine whose arena is filled.
        feed: The engine's residency events.
        attachment: Content of the hello.
        wait_s: How long the store may stay away, or say nothing to what it is asked, before the requests that need it are
            told.
    """

    def __init__(
        self,
        dial: Callable[[], grpc.aio.Channel],
        engine: Engine,
        feed: ResidencyFeed,
        attachment: Attachment,
        *,
        wait_s: float,
    ) -> None:
        self._dial = dial
        self._engine = engine
        self._feed = feed
        self._attachment = attachment
        self._silence = StoreSilence(wait_s)
        self._wanted: dict[str, WantImage] = {}
        self._call: _Call | None = None  # once the store has welcomed it
        self._was_told_away = False
        callbacks = TransferCallbacks(grant=self._grant, decline=self._decline, fail=self._fail)
        self._transfers = ImageTransfers(engine, attachment.max_image_pages, callbacks)
        self._outgoing: asyncio.Queue[_Request | None] = asyncio.Queue()  # None ends a stream

    @property
    def is_attached(self) -> bool:
        """True while a store is connected."""
        return self._call is not None

    def is_prefetching(self, digest: str) -> bool:
        """Tell whether an unsolicited image of the adapter is on its way."""
        return self._transfers.is_prefetching(digest)

    def want(self, event: WantImage) -> None:
        """Ask for an image, now or as soon as a store is connected."""
        self._wanted[event.digest] = event
        if self.is_attached:
            self._ask(event)

    def changed(self, event: ResidencyChanged) -> None:
        """Forget wants that were met, refused or given up."""
        if event.state is not ResidencyState.WANTED:
            self._wanted.pop(event.digest, None)
            self._silence.owes_no_more(event.digest)

    async def run(self) -> None:
        """Stay attached until cancelled."""
        expiry = asyncio.create_task(self._expire_wants(), name="want-expiry")
        try:
            await keep_connected(self._dial_once, first_pause_s=FIRST_BACKOFF_S, max_pause_s=MAX_BACKOFF_S)
        finally:
            await cancel_and_wait(expiry)
            await self._transfers.abandon_all()
            self._transfers.close()

    async def _dial_once(self) -> bool:
        # A new channel each time: an old one would wait out gRPC's own, longer, backoff, with the credentials of then.
        async with self._dial() as channel:
            return await self._attach_once(adapter_store_pb2_grpc.AdapterStoreServiceStub(channel))

    async def _attach_once(self, stub: adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub) -> bool:
        """Keep one stream to its end; return whether the store ever welcomed it."""
        outgoing: asyncio.Queue[_Request | None] = asyncio.Queue()
        self._outgoing = outgoing
        position = self._feed.sequence
        self._outgoing.put_nowait(_Request(hello=self._hello(position)))
        call = stub.AttachEngine(self._requests(outgoing))
        kept = KeptStatus(call)  # the store refuses while the first message is on its way to it
        reporter = asyncio.create_task(self._report(position), name="residency-reporter")
        was_welcomed = False
        try:
            async for response in call:
                self._silence.heard()
                if response.HasField("welcome"):
                    was_welcomed, self._call = True, call
                    self._welcomed(response.welcome)
                elif not await self._handle(response):
                    break
            _log.warning("adapter store closed the stream")
        except grpc.aio.AioRpcError as error:
            say = _log.warning if was_welcomed or not self._was_told_away else _log.debug
            status = kept.behind(error)
            say("adapter store is away", code=status.code().name, details=status.details())
            self._was_told_away = True
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # otherwise the call alone has been cancelled
            _log.warning("gave up an adapter store that says nothing")
        finally:
            self._call = None
            self._silence.disconnected()
            call.cancel()
            outgoing.put_nowait(None)  # grpc.aio leaves its reader of them waiting, once the store has ended the call
            await cancel_and_wait(reporter)
            await self._transfers.abandon_all()
        return was_welcomed

    @staticmethod
    async def _requests(queue: asyncio.Queue[_Request | None]) -> AsyncIterator[_Request]:
        while (request := await queue.get()) is not None:
            yield request

    def _hello(self, sequence: int) -> _Request.Hello:
        arena = self._engine.arena
        return _Request.Hello(
            engine_id=self._attachment.engine_id,
            base_model=self._attachment.base_model,
            geometry=geometry_wire.to_message(self._engine.geometry),
            arenas=[
                _Request.Arena(
                    num_slots=arena.num_slots,
                    num_free=arena.num_free,
                    pid=os.getpid(),
                    fd=arena.fd,
                    header_bytes=arena.first_byte(rank),
                    nonce=arena.nonce,
                )
                for rank in range(len(arena.views))
            ],
            held=[store_wire.held(event) for event in self._feed.held],
            sequence=sequence,
            max_image_pages=self._attachment.max_image_pages,
            max_rank=self._attachment.max_rank,
            max_added_tokens=self._attachment.max_added_tokens,
            weight_norms=self._engine.weight_norms,
            takes_tree_digests=True,
            takes_written=True,
        )

    def _welcomed(self, welcome: _Response.Welcome) -> None:
        _log.info("attached to adapter store", store=welcome.store_id, shared_memory=list(welcome.shared_memory))
        self._transfers.is_shared = any(welcome.shared_memory)
        for event in self._wanted.values():
            self._ask(event)

    def _ask(self, event: WantImage) -> None:
        self._silence.owes(event.digest)
        self._outgoing.put_nowait(store_wire.want(event))

    async def _report(self, position: int) -> None:
        """Send the state of each adapter that changed after ``position``."""
        while True:
            latest = {event.digest: event for event in self._feed.since(position)}
            for event in sorted(latest.values(), key=lambda event: event.sequence):
                residency = _Request.Residency(sequence=event.sequence, held=store_wire.held(event))
                self._outgoing.put_nowait(_Request(residency=residency))
            position = self._feed.sequence
            await asyncio.sleep(REPORT_PAUSE_S)
            await self._feed.wait_beyond(position)

    async def _handle(self, response: _Response) -> bool:
        """Act on a message; False if the stream must be started anew."""
        match response.WhichOneof("message"):
            case "offer":
                self._silence.owes_no_more(response.offer.digest)  # now the engine has to find room
                await self._transfers.offered(store_wire.offer(response.offer))
            case "chunk":
                chunk = response.chunk
                await self._transfers.write(chunk.digest, chunk.rank, chunk.offset, chunk.data, chunk.crc32c)
            case "written":
                written = response.written
                await self._transfers.written(written.digest, written.rank, written.pages)
            case "filled":
                filled = response.filled
                self._silence.owes_no_more(filled.digest)
                self._transfers.filled(filled.digest, filled.rank, filled.image_tree_sha256)
            case "refuse":
                await self._refused(response.refuse)
            case "drop":
                self._engine.post(DropAdapter(response.drop.digest))
            case "ack":
                return self._agrees(response.ack)
            case unknown:
                _log.warning("unknown message of the adapter store", message=unknown)
        return True

    async def _refused(self, refuse: _Response.Refuse) -> None:
        await self._transfers.abandon(refuse.digest)
        self._wanted.pop(refuse.digest, None)
        self._silence.owes_no_more(refuse.digest)
        self._engine.post(ImageRefused(refuse.digest, from_status(refuse.status)))

    def _agrees(self, ack: _Response.Ack) -> bool:
        """Compare the store's view with the engine's, if both refer to the same event."""
        held = self._feed.held
        if ack.sequence == self._feed.sequence and ack.num_held != len(held):
            _log.warning("adapter store lost track of this engine", believes=ack.num_held, held=len(held))
            return False
        return True

    def _grant(self, digest: str, rank: int, slots: tuple[int, ...]) -> None:
        if digest in self._wanted:
            self._silence.owes(digest)
        self._outgoing.put_nowait(_Request(grant=_Request.Grant(digest=digest, rank=rank, slots=slots)))

    def _decline(self, digest: str) -> None:
        self._outgoing.put_nowait(_Request(decline=_Request.Decline(digest=digest)))

    def _fail(self, digest: str, error: LoraplexError) -> None:
        _log.error("adapter image is corrupt", digest=digest, error=error.message)
        held = _Request.Held(digest=digest, tier=adapter_pb2.TIER_STORE)
        residency = _Request.Residency(sequence=self._feed.sequence, held=held, error=to_status(error))
        self._outgoing.put_nowait(_Request(residency=residency))

    async def _expire_wants(self) -> None:
        """Tell the requests that need the store when it has been away, or said nothing, for too long."""
        looked_at_s = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            elapsed_s, looked_at_s = time.monotonic() - looked_at_s, time.monotonic()
            if not self._silence.look(elapsed_s, is_attached=self.is_attached):
                continue
            if self._call is not None:  # a new stream may reach another store, or this one once it goes on
                call, self._call = self._call, None
                call.cancel()
            for digest in list(self._wanted):
                del self._wanted[digest]
                error = StoreUnavailableError(
                    f"adapter {digest} is not on this engine, and the adapter store has not answered for "
                    f"{self._silence.seconds:.0f} s: ask again once the store is back, or look at why it is not",
                    retry_after_s=RETRY_AFTER_S,
                )
                self._engine.post(ImageRefused(digest, error))
