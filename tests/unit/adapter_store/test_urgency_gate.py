"""The adapter that is needed first gets the next turn."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from google.protobuf import duration_pb2
from loraplex.v1 import adapter_store_pb2
from loraplex_adapter_store import attach_wire
from loraplex_adapter_store.attach.attached import AttachedEngines
from loraplex_adapter_store.attach.messages import ArenaInfo, Hello, Want
from loraplex_adapter_store.attach.session import EngineSession
from loraplex_adapter_store.attach.transfer import Transfer
from loraplex_adapter_store.attach.urgency import UrgencyGate
from support.decoder_shapes import decoder_geometry


def make_transfer(digest: str, *, is_wanted: bool = True, time_left_s: float | None = None) -> Transfer:
    transfer = Transfer(digest, is_wanted=is_wanted, num_ranks=1)
    transfer.needed_within(time_left_s)
    return transfer


class Bench:
    """A gate that one transfer holds; the others queue up behind it and note when they got in."""

    def __init__(self) -> None:
        self.gate = UrgencyGate(1)
        self.order: list[str] = []
        self.release = asyncio.Event()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.cancelled_when_chosen: list[str] = []

    async def hold(self) -> None:
        entered = asyncio.Event()

        async def first() -> None:
            async with self.gate.turn(make_transfer("holder")):
                entered.set()
                await self.release.wait()
            for digest in self.cancelled_when_chosen:  # the turn is given away, its new owner has not run yet
                self.tasks[digest].cancel()

        self.tasks["holder"] = asyncio.create_task(first())
        await entered.wait()

    async def queue(self, transfer: Transfer) -> None:
        async def run() -> None:
            async with self.gate.turn(transfer):
                self.order.append(transfer.digest)

        self.tasks[transfer.digest] = asyncio.create_task(run())
        await asyncio.sleep(0)

    async def finish(self) -> list[str]:
        self.release.set()
        for task in self.tasks.values():
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return self.order


async def test_wanted_ones_go_before_unsolicited_and_the_earliest_deadline_first() -> None:
    bench = Bench()
    await bench.hold()
    await bench.queue(make_transfer("unsolicited", is_wanted=False))
    await bench.queue(make_transfer("whenever"))
    await bench.queue(make_transfer("later", time_left_s=60))
    await bench.queue(make_transfer("soon", time_left_s=5))

    assert await bench.finish() == ["soon", "later", "whenever", "unsolicited"]


async def test_a_transfer_cancelled_just_before_a_turn_is_given_away_does_not_take_it_along() -> None:
    bench = Bench()
    await bench.hold()
    await bench.queue(make_transfer("cancelled", time_left_s=1))
    await bench.queue(make_transfer("next", time_left_s=5))
    bench.release.set()
    bench.tasks["cancelled"].cancel()  # it leaves the queue when it runs, which is after the holder

    assert await bench.finish() == ["next"]
    async with asyncio.timeout(5), bench.gate.turn(make_transfer("later")):
        pass


async def test_urgency_that_rises_while_waiting_counts() -> None:
    bench = Bench()
    prefetched, wanted = make_transfer("prefetched", is_wanted=False), make_transfer("wanted", time_left_s=60)
    await bench.hold()
    await bench.queue(wanted)
    await bench.queue(prefetched)
    prefetched.is_wanted = True
    prefetched.needed_within(1)

    assert await bench.finish() == ["prefetched", "wanted"]


async def test_equals_keep_their_order() -> None:
    bench = Bench()
    await bench.hold()
    for digest in "abc":
        await bench.queue(make_transfer(digest))

    assert await bench.finish() == ["a", "b", "c"]


@pytest.mark.parametrize("when", ["waiting", "chosen"])
async def test_a_cancelled_waiter_leaves_its_turn_to_the_next(when: str) -> None:
    bench = Bench()
    await bench.hold()
    await bench.queue(make_transfer("cancelled", time_left_s=1))
    await bench.queue(make_transfer("next"))
    if when == "chosen":
        bench.cancelled_when_chosen.append("cancelled")
    else:
        bench.tasks["cancelled"].cancel()

    assert await bench.finish() == ["next"]
    async with asyncio.timeout(5), bench.gate.turn(make_transfer("later")):
        pass


async def test_the_earliest_of_several_deadlines_counts() -> None:
    transfer = make_transfer("a", time_left_s=60)
    transfer.needed_within(5)
    before = transfer.urgency
    transfer.needed_within(30)
    transfer.needed_within(None)

    assert transfer.urgency == before


def test_a_wants_time_left_arrives_as_seconds_and_its_absence_as_none() -> None:
    request = adapter_store_pb2.AttachEngineRequest
    left = duration_pb2.Duration(seconds=2, nanos=500_000_000)

    hurried = attach_wire.from_engine(request(want=request.Want(digest="ab" * 32, time_left=left)))
    patient = attach_wire.from_engine(request(want=request.Want(digest="ab" * 32)))

    assert hurried == Want("ab" * 32, 2.5)
    assert patient == Want("ab" * 32, None)


async def test_foreseen_ones_go_behind_wanted_ones_by_when_they_will_be_wanted() -> None:
    bench = Bench()
    await bench.hold()
    transfers = {name: make_transfer(name, is_wanted=name == "wanted") for name in ("idle", "late", "soon", "wanted")}
    transfers["late"].foreseen_within(10.0)
    transfers["soon"].foreseen_within(10.0)
    transfers["soon"].foreseen_within(1.0)
    for transfer in transfers.values():
        await bench.queue(transfer)

    assert await bench.finish() == ["wanted", "soon", "late", "idle"]


async def test_what_was_foreseen_for_soon_does_not_go_before_more_urgent_wants_once_it_is_wanted() -> None:
    foreseen, urgent = make_transfer("foreseen", is_wanted=False), make_transfer("urgent", time_left_s=1.0)
    foreseen.foreseen_within(0.0)
    foreseen.is_wanted = True

    assert urgent.urgency < foreseen.urgency


def make_session() -> tuple[EngineSession, AttachedEngines]:
    """Return a session that never gets an image, and the engines it is one of."""
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
    images = SimpleNamespace(get=lambda key, fit: asyncio.Event().wait())
    arena = ArenaInfo(num_slots=4, num_free=4, pid=-1, fd=-1, header_bytes=0, nonce=b"")
    hello = Hello(
        engine_id="e",
        base_name="base",
        base_fingerprint="00" * 32,
        geometry=geometry,
        arenas=(arena,),
        held=(),
        sequence=0,
        max_image_pages=4,
    )
    session = EngineSession(hello, images, SimpleNamespace(), SimpleNamespace(), lambda: None)  # type: ignore[arg-type]
    engines = AttachedEngines.__new__(AttachedEngines)
    engines._sessions = {"e": session}
    return session, engines


@pytest.mark.parametrize("way", ["here", "through Valkey"])
async def test_a_hints_time_orders_what_is_brought(way: str) -> None:
    session, engines = make_session()
    hinted = {"aa" * 32: 9000, "bb" * 32: 10, "cc" * 32: 500}

    for digest, wanted_in_ms in hinted.items():
        if way == "here":
            engines.prefetch("e", digest, wanted_in_ms)
        else:
            fields = {b"kind": b"prefetch", b"revision": digest.encode(), b"wanted_in_ms": b"%d" % wanted_in_ms}
            await engines._act_on(session, fields)
    session.prefetch("dd" * 32)

    order = sorted(session._transfers.values(), key=lambda transfer: transfer.urgency)
    assert [transfer.digest[:2] for transfer in order] == ["bb", "cc", "aa", "dd"]
    await session.close()


@pytest.mark.parametrize("said", [None, b"soon", b"-5"])
async def test_a_hint_that_says_no_time_means_now(said: bytes | None) -> None:
    session, engines = make_session()
    fields = {b"kind": b"prefetch", b"revision": b"aa" * 32} | ({} if said is None else {b"wanted_in_ms": said})

    await engines._act_on(session, fields)

    assert session._transfers["aa" * 32].foreseen_s <= asyncio.get_running_loop().time()
    await session.close()
