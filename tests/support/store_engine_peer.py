"""A test client of AttachEngine: an engine's side of the protocol over a real memory-file arena, without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import mmap
import os
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import crc32c
import numpy as np
from google.rpc import status_pb2
from loraplex.v1 import adapter_pb2, adapter_store_pb2_grpc
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common import geometry_wire
from loraplex_common.arena_file import create_arena_file
from loraplex_common.error_status import from_status
from loraplex_engine.rpc.image_check import ImageCheck, ImageHash

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc
    from loraplex_common.adapter_image import Geometry
    from loraplex_common.base_model import BaseModelInfo
    from numpy.typing import NDArray

HEADER_BYTES = 4096
_Request = pb.AttachEngineRequest


class EnginePeer:
    """Grants offers, checks the images that arrive and reports on them.

    Attributes:
        auto_grant: Whether offers are granted automatically.
        accept_unsolicited: Whether unsolicited offers are granted; otherwise they are declined.
        takes_tree_digests: Whether it is an engine that checks the digest that comes last, and none of an earlier version.
        num_to_spoil: That many of the next images are reported corrupt.
        takes_written: Whether it hashes pages while others are on their way.
        num_written: Digest -> pages that the store said were written.
        num_to_flip: In that many of the next images a bit is flipped in the arena before it is hashed.
        num_to_drop: That many of the next images are dropped, and wanted again, before their arrival is reported.
        keeps_copies: Whether ``images`` shows pages; else they have none, which is what takes no time.
        num_bytes: Digest -> bytes of the image that arrived and was right.
        images: Digest -> the image that arrived and was right, ``[num_pages, page_bytes]``.
        log: Every message of the store.
    """

    def __init__(self, base: BaseModelInfo, geometry: Geometry, num_slots: int, engine_id: str) -> None:
        self.engine_id = engine_id
        self.auto_grant = True
        self.accept_unsolicited = True
        self.num_to_spoil = 0
        self.num_to_drop = 0
        self.num_to_flip = 0
        self.has_ended = False
        self.takes_tree_digests = True
        self.takes_written = True
        self.num_written: dict[str, int] = {}
        self._hashes: dict[str, ImageHash] = {}
        self.keeps_copies = True
        self.num_bytes: dict[str, int] = {}
        self._check = ImageCheck()
        self.images: dict[str, NDArray[np.uint8]] = {}
        self.log: list[pb.AttachEngineResponse] = []
        self._base = base
        self._geometry = geometry
        self._outgoing: asyncio.Queue[_Request | None] = asyncio.Queue()
        self._free = list(range(num_slots))
        self._granted: dict[str, tuple[int, ...]] = {}
        self._offers: dict[str, pb.AttachEngineResponse.Offer] = {}
        self._sequence = 0
        self._changed = asyncio.Event()
        self._num_slots = num_slots
        self._fd = create_arena_file(HEADER_BYTES + num_slots * geometry.page_bytes)
        self._map = mmap.mmap(self._fd, HEADER_BYTES + num_slots * geometry.page_bytes)
        self.nonce = secrets.token_bytes(32)
        self._map[:32] = self.nonce

    def hello(self, **changes: Any) -> _Request.Hello:
        """Return the first message."""
        arena = _Request.Arena(
            num_slots=self._num_slots,
            num_free=len(self._free),
            pid=os.getpid(),
            fd=self._fd,
            header_bytes=HEADER_BYTES,
            nonce=self.nonce,
        )
        hello = _Request.Hello(
            engine_id=self.engine_id,
            base_model=adapter_pb2.BaseModel(name=self._base.name, fingerprint=self._base.fingerprint),
            geometry=geometry_wire.to_message(self._geometry),
            arenas=[arena],
            held=[self._held(digest) for digest in self.images],
            sequence=self._sequence,
            max_image_pages=self._num_slots,
            takes_tree_digests=self.takes_tree_digests,
            takes_written=self.takes_written,
        )
        hello.MergeFrom(_Request.Hello(**changes))
        return hello

    def without_shared_memory(self) -> None:
        """Make the nonce wrong, as for a store on another host that has a process with this number."""
        self.nonce = secrets.token_bytes(32)

    def touch_arena(self) -> None:
        """Let the kernel give the arena its memory, as an engine does at its start."""
        np.frombuffer(self._map, dtype=np.uint8)[HEADER_BYTES:] = 0

    def say(self, **message: Any) -> None:
        """Send any message."""
        self._outgoing.put_nowait(_Request(**message))

    def want(self, digest: str) -> None:
        """Ask for an image."""
        self.say(want=_Request.Want(digest=digest))

    def report(self, digest: str, tier: adapter_pb2.Tier.ValueType, *, num_leases: int = 0, error: Any = None) -> None:
        """Report a change of residency."""
        self._sequence += 1
        held = _Request.Held(digest=digest, tier=tier, generation=1, num_leases=num_leases)
        self.say(residency=_Request.Residency(sequence=self._sequence, held=held, error=error))

    def grant(self, digest: str, slots: tuple[int, ...] | None = None) -> None:
        """Grant slots for an offer."""
        if slots is None:
            count = self._offers[digest].num_pages
            slots, self._free = tuple(self._free[:count]), self._free[count:]
        self._granted[digest] = slots
        self.say(grant=_Request.Grant(digest=digest, rank=0, slots=slots))

    async def received(self, kind: str, digest: str = "", *, count: int = 1, timeout_s: float = 20.0) -> Any:
        """Wait until ``count`` messages of a kind (about a digest) have come; return the last."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            found = [
                m for m in (getattr(r, kind) for r in self.log if r.WhichOneof("message") == kind) if _about(m, digest)
            ]
            if len(found) >= count:
                return found[count - 1]
            self._changed.clear()
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait_for(self._changed.wait(), left)

    async def image(self, digest: str) -> NDArray[np.uint8]:
        """Wait until an image has arrived and been checked."""
        while digest not in self.images:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 20.0)
        return self.images[digest]

    async def image_or_refusal(self, digest: str) -> NDArray[np.uint8]:
        """Wait until an image has arrived and been checked.

        Raises:
            LoraplexError: If the store refuses it.
            OSError: If the stream ends before.
        """
        while digest not in self.images:
            for refuse in (each.refuse for each in self.log if each.WhichOneof("message") == "refuse"):
                if refuse.digest == digest:
                    raise from_status(refuse.status)
            if self.has_ended:
                raise OSError("the stream has ended")
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 20.0)
        return self.images[digest]

    def kinds(self) -> list[str]:
        """Return the kinds of all messages in order."""
        return [str(response.WhichOneof("message")) for response in self.log]

    async def run(self, call: Any) -> None:
        """Serve the stream to its end."""
        try:
            async for response in call:
                self.log.append(response)
                match response.WhichOneof("message"):
                    case "offer":
                        self._offered(response.offer)
                    case "chunk":
                        self._write(response.chunk)
                    case "written":
                        self._written(response.written)
                    case "filled":
                        await self._filled(response.filled)
                self._changed.set()
        finally:
            self.has_ended = True
            self._changed.set()

    def close(self) -> None:
        """Release the arena."""
        self._check.close()
        with contextlib.suppress(BufferError):  # the last view of it, in a thread that ends, unmaps it
            self._map.close()
        os.close(self._fd)

    async def requests(self, hello: _Request.Hello) -> AsyncIterator[_Request]:
        """Yield the messages to send."""
        yield _Request(hello=hello)
        while (message := await self._outgoing.get()) is not None:
            yield message

    def _held(self, digest: str) -> _Request.Held:
        return _Request.Held(digest=digest, tier=adapter_pb2.TIER_ARENA, generation=1)

    def _offered(self, offer: pb.AttachEngineResponse.Offer) -> None:
        self._offers[offer.digest] = offer
        if not offer.wanted and not self.accept_unsolicited:
            self.say(decline=_Request.Decline(digest=offer.digest))
        elif self.auto_grant:
            self.grant(offer.digest)

    def _write(self, chunk: pb.AttachEngineResponse.Chunk) -> None:
        assert crc32c.crc32c(chunk.data) == chunk.crc32c
        page, start = divmod(chunk.offset, self._geometry.page_bytes)
        assert start + len(chunk.data) <= self._geometry.page_bytes
        position = self._position(self._granted[chunk.digest][page]) + start
        self._map[position : position + len(chunk.data)] = chunk.data

    def _position(self, slot: int) -> int:
        return HEADER_BYTES + slot * self._geometry.page_bytes

    def _flip(self, slot: int) -> None:
        if self.num_to_flip:
            self.num_to_flip -= 1
            self._map[self._position(slot)] ^= 1

    def _hash(self, digest: str) -> ImageHash:
        if digest not in self._hashes:
            arena = np.frombuffer(self._map, dtype=np.uint8)[HEADER_BYTES:].reshape(-1, self._geometry.page_bytes)
            self._hashes[digest] = self._check.begin(arena, self._granted[digest])
        return self._hashes[digest]

    def _written(self, written: pb.AttachEngineResponse.Written) -> None:
        self._flip(self._granted[written.digest][written.pages[-1]])
        self.num_written[written.digest] = self.num_written.get(written.digest, 0) + len(written.pages)
        self._hash(written.digest).add(written.pages)

    async def _filled(self, filled: pb.AttachEngineResponse.Filled) -> None:
        digest, page_bytes = filled.digest, self._geometry.page_bytes
        slots = self._granted[digest]
        if digest not in self._hashes:
            self._flip(slots[-1])
        root = await self._hash(digest).tree_sha256()
        del self._hashes[digest]  # while there is a view of the arena, it cannot be closed
        image = np.empty((0, page_bytes), dtype=np.uint8)
        if self.keeps_copies:
            image = np.frombuffer(self._map, dtype=np.uint8)[HEADER_BYTES:].reshape(-1, page_bytes)[list(slots)]
        is_right = root == filled.image_tree_sha256
        if not self.takes_tree_digests:
            is_right = hashlib.sha256(image.data).hexdigest() == self._offers[digest].image_sha256
        if self.num_to_spoil or not is_right:
            self.num_to_spoil = max(0, self.num_to_spoil - 1)
            self._free += self._granted.pop(digest)
            self.report(digest, adapter_pb2.TIER_STORE, error=status_pb2.Status(code=15, message="sha256 is wrong"))
            return
        if self.num_to_drop:
            self.num_to_drop -= 1
            self._free += self._granted.pop(digest)
            self.report(digest, adapter_pb2.TIER_STORE)
            self.want(digest)
            return
        self.images[digest] = image
        self.num_bytes[digest] = len(slots) * page_bytes
        self.report(digest, adapter_pb2.TIER_ARENA)


def _about(message: Any, digest: str) -> bool:
    return not digest or getattr(message, "digest", "") == digest


@asynccontextmanager
async def attached_peer(
    channel: grpc.aio.Channel,
    base: BaseModelInfo,
    *,
    dtype: str = "float32",
    page_bytes: int = 64 * 1024,
    num_slots: int = 256,
    engine_id: str = "engine-test",
    shares_memory: bool = True,
    peer: EnginePeer | None = None,
    **hello: Any,
) -> AsyncIterator[EnginePeer]:
    """Attach a peer and wait for the welcome."""
    own = peer or EnginePeer(base, base.geometry(dtype=dtype, page_bytes=page_bytes), num_slots, engine_id)
    if not shares_memory:
        own.without_shared_memory()
    call: Any = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel).AttachEngine(own.requests(own.hello(**hello)))
    task = asyncio.create_task(own.run(call))
    try:
        welcome = await own.received("welcome")
        assert list(welcome.shared_memory) == [shares_memory]
        yield own
    finally:
        call.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # the tests look at what came
        if peer is None:
            own.close()
