"""The offers of one image, one for each tensor-parallel rank, are sent next to each other."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING

from loraplex_adapter_store.attach.messages import ArenaInfo, Drop, Hello, Offer
from loraplex_adapter_store.attach.outbox import LENGTH
from loraplex_adapter_store.attach.session import EngineSession
from loraplex_adapter_store.attach.transfer import Transfer, TransferState
from support.decoder_shapes import decoder_geometry

if TYPE_CHECKING:
    from loraplex_adapter_store.attach.messages import ToEngine

NUM_RANKS = 4
DIGEST = "ab" * 32


def make_session() -> EngineSession:
    geometry = decoder_geometry(
        dtype="float32",
        page_bytes=512,
        num_layers=1,
        hidden_size=8,
        intermediate_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
    )
    arena = ArenaInfo(num_slots=4, num_free=4, pid=-1, fd=-1, header_bytes=0, nonce=b"")
    hello = Hello(
        engine_id="e",
        base_name="base",
        base_fingerprint="00" * 32,
        geometry=geometry,
        arenas=(arena,) * NUM_RANKS,
        held=(),
        sequence=0,
        max_image_pages=4,
    )
    unused = SimpleNamespace(close=lambda: None)
    return EngineSession(hello, unused, unused, unused, lambda: None)  # type: ignore[arg-type]


def offered(session: EngineSession) -> Transfer:
    transfer = Transfer(DIGEST, is_wanted=False, num_ranks=NUM_RANKS)
    transfer.offers = [
        Offer(digest=DIGEST, rank=rank, num_pages=1, image_sha256="", is_wanted=False, spec=b"{}")
        for rank in range(NUM_RANKS)
    ]
    transfer.advance(TransferState.OFFERED)
    session._transfers[DIGEST] = transfer
    return transfer


async def test_a_want_that_comes_between_the_offers_of_two_ranks_is_offered_behind_all_of_them() -> None:
    session = make_session()
    transfer = offered(session)
    for _ in range(LENGTH - 2):
        await session._outbox.put(Drop("cd" * 32))
    first = asyncio.create_task(session._offer(transfer))
    while not session._outbox._room.locked():  # noqa: ASYNC110 -- nothing tells that a semaphore is full
        await asyncio.sleep(0)

    session.want(DIGEST)
    sent: list[ToEngine] = []
    async for message in session.outgoing():
        sent.append(message)
        if len(sent) == LENGTH - 2 + 2 * NUM_RANKS:
            session.end()
    await first

    offers = [(message.is_wanted, message.rank) for message in sent if isinstance(message, Offer)]
    assert offers == [(is_wanted, rank) for is_wanted in (False, True) for rank in range(NUM_RANKS)]
    assert sum(isinstance(message, Drop) for message in sent) == LENGTH - 2
    await session.close()
