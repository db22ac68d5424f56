"""Requests that add several adapters up: all of them are there for such a request, or none is held for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec
from loraplex_common.errors import (
    AdapterLoadingError,
    AdapterNotFoundError,
    InvalidParameterError,
    QueueTimeoutError,
    RequestTooLargeError,
)
from loraplex_common.flora import Flora
from loraplex_common.low_rank import LowRank
from loraplex_common.token_rows import Rows
from loraplex_common.vectors import InVector, OutVector
from loraplex_engine.messages import AdapterTerm, FinishReason, Loading, ResidencyState
from loraplex_engine.step import NO_MORE_ADAPTERS
from support.fake_adapters import fake_image
from support.scheduler_rig import PAGE_BYTES, Client, Rig, make_submission, solo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_common.part_kind import Part
    from loraplex_engine.messages import Submission


def summing(slot: int, digests: str | Sequence[str], *, scale: float = 1.0, **fields: object) -> Submission:
    """Return a request for several adapters; all but the first at ``scale``."""
    first, *more = list(digests)
    terms = tuple(AdapterTerm(digest, scale) for digest in more)
    return make_submission(slot=slot, adapter=first, more_adapters=terms, **fields)  # type: ignore[arg-type]


def deliver_all(rig: Rig, num_pages: int = 1) -> None:
    for digest in rig.wanted:
        rig.deliver(digest, num_pages)


def check_tokens(*clients: Client) -> None:
    for client in clients:
        assert client.finish_reason is FinishReason.LENGTH
        assert client.tokens == solo(client.submission, len(client.tokens))


def test_a_request_starts_once_all_its_adapters_are_there_and_leases_each_of_them(depth: int) -> None:
    rig = Rig(depth=depth)
    client = rig.submit(summing(0, "ab", scale=0.5, max_new_tokens=8))
    assert sorted(rig.wanted) == ["a", "b"]
    rig.deliver("b")
    rig.run()
    assert client.num_started == 0
    assert rig.cache.state_of("b") is ResidencyState.IN_ARENA, "what waits for others holds no room on the device"

    rig.deliver("a")
    while not client.tokens:
        rig.turn()

    assert [rig.cache.states.status(digest).num_leases for digest in "ab"] == [1, 1]
    rig.run()
    check_tokens(client)
    rig.check_finished()


def test_steps_without_such_a_row_carry_the_one_empty_list() -> None:
    rig = Rig()
    rig.submit(make_submission(slot=0, adapter="a"))
    rig.deliver("a")
    rig.turn()
    rig.turn()

    plan = rig.scheduler.schedule()
    assert plan is not None
    assert plan.more_adapters is NO_MORE_ADAPTERS


def test_a_refused_image_ends_the_requests_that_name_it_and_no_others() -> None:
    rig = Rig()
    lost = [
        rig.submit(summing(0, "ab")),
        rig.submit(summing(1, "bc")),
        rig.submit(make_submission(slot=2, adapter="b")),
    ]
    others = [rig.submit(summing(3, "ac")), rig.submit(make_submission(slot=4, adapter="a"))]

    rig.refuse("b")
    deliver_all(rig)
    rig.run()

    assert [type(client.error) for client in lost] == [AdapterNotFoundError] * 3
    assert all("no b" in str(client.error) for client in lost)
    check_tokens(*others)
    rig.check_finished()


def test_a_load_that_fails_ends_the_requests_that_name_it_and_their_other_adapters_are_free() -> None:
    rig = Rig(loads_at_once=False)
    lost, other = rig.submit(summing(0, "ab")), rig.submit(summing(1, "ac"))
    deliver_all(rig)
    rig.turn()
    assert rig.cache.state_of("b") is ResidencyState.LOADING

    del rig.loads["b"]
    broken = next(each for each in rig.runner.loading if each.spec.digest == "b")
    rig.runner.loading.remove(broken)
    index = next(index for index, each in rig.runner.adapters.items() if each is broken)
    del rig.runner.adapters[index]
    rig.scheduler.load_refused("b", AdapterNotFoundError("adapter b is broken"))
    rig.run()

    assert "adapter b is broken" in str(lost.error)
    check_tokens(other)
    rig.check_finished()


def test_fail_fast_names_the_adapters_that_are_missing_and_brings_all_of_them() -> None:
    rig = Rig()
    rig.submit(make_submission(slot=0, adapter="a"))
    rig.deliver("a")
    rig.run()

    client = rig.submit(summing(1, "abc", fail_fast=True))
    rig.take_outputs()

    assert isinstance(client.error, AdapterLoadingError)
    assert "adapter b is being loaded; adapter c is being loaded" in str(client.error)
    deliver_all(rig)
    rig.run()
    again = rig.submit(summing(2, "abc", fail_fast=True))
    rig.run()
    check_tokens(again)


def test_progress_is_that_of_all_adapters_together() -> None:
    rig = Rig()
    rig.submit(make_submission(slot=0, adapter="a"))
    rig.deliver("a", 2)
    rig.run()

    rig.scheduler.submit(summing(1, "abc"))
    rig.deliver("b", 3)
    events = [e for e in rig.scheduler.take_outputs()[1].events if isinstance(e, Loading)]

    first, second = events
    assert (first.state, first.bytes_done, first.bytes_total) == (ResidencyState.WANTED, 2 * PAGE_BYTES, 2 * PAGE_BYTES)
    assert (second.state, second.bytes_done, second.bytes_total) == (
        ResidencyState.WANTED,
        5 * PAGE_BYTES,
        5 * PAGE_BYTES,
    )


@pytest.mark.parametrize("num_crossing", [2, 6])
def test_crossing_lists_in_a_pool_with_room_for_two_adapters_all_run(depth: int, num_crossing: int) -> None:
    rig = Rig(depth=depth, num_pages=3 + 2 * 2, block_tokens=4, num_arena_slots=4, loads_at_once=False)
    lists = ["ab", "ba", "cd", "dc", "bc", "ca"][:num_crossing]
    clients = [rig.submit(summing(slot, digests, prompt=[slot] * 4)) for slot, digests in enumerate(lists)]

    for _ in range(60):
        deliver_all(rig, 2)
        rig.run()

    check_tokens(*clients)
    rig.check_finished()


LISTS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3, unique=True)


@given(
    lists=st.lists(LISTS, min_size=2, max_size=8),
    sizes=st.lists(st.integers(1, 3), min_size=6, max_size=6),
    spare_slots=st.integers(0, 2),
    spare_places=st.integers(0, 1),
    max_num_seqs=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
    turns=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_lists_run_in_pools_arenas_and_tables_that_hold_no_more_than_the_largest_of_them(
    lists: list[list[str]],
    sizes: list[int],
    spare_slots: int,
    spare_places: int,
    max_num_seqs: int,
    order: object,
    turns: int,
) -> None:
    pages = dict(zip("abcdef", sizes, strict=True))
    largest = max(sum(pages[digest] for digest in digests) for digests in lists)
    rig = Rig(
        num_pages=3 + largest,
        num_arena_slots=largest + spare_slots,
        max_resident_adapters=max(map(len, lists)) + spare_places,
        max_num_seqs=max_num_seqs,
        block_tokens=4,
        loads_at_once=False,
        step_s=0.05,
    )
    clients = []
    for slot, digests in enumerate(lists):
        clients.append(rig.submit(summing(slot, digests, prompt=[slot] * 4)))
        for _ in range(turns):
            rig.turn()

    for _ in range(80 * len(lists)):
        if rig.scheduler.num_open == 0:
            break
        wanted = rig.wanted
        order.shuffle(wanted)  # type: ignore[attr-defined]
        for digest in wanted[:2]:
            rig.deliver(digest, pages[digest])
        rig.now_s += 0.1
        rig.turn()
        if rig.runner.loading:
            rig.runner.finish_load(order.choice(rig.runner.loading))  # type: ignore[attr-defined]
    rig.run()

    check_tokens(*clients)
    rig.check_finished()


def test_a_list_larger_than_the_pool_is_refused_with_the_arithmetic() -> None:
    rig = Rig(num_pages=6, block_tokens=4)
    client = rig.submit(summing(0, "abc", max_new_tokens=8))
    for digest in "abc":
        rig.deliver(digest, 2)
    rig.run()

    assert isinstance(client.error, RequestTooLargeError)
    assert "need 3 pages of 4 tokens, the 3 adapters 4 pages; the pool has 6" in str(client.error)


def test_a_list_larger_than_the_arena_is_refused_with_the_arithmetic_when_its_size_is_known() -> None:
    rig = Rig(num_pages=32, num_arena_slots=5)
    client = rig.submit(summing(0, "ab"))
    rig.deliver("a", 3)
    assert not rig.deliver("b", 3), "the arena has no room for it"
    rig.run()

    assert isinstance(client.error, RequestTooLargeError)
    assert "2 adapters that are to be added up take 6 pages of 64 bytes; the arena has 5" in str(client.error)


def test_a_list_longer_than_the_table_of_adapters_is_refused_with_the_arithmetic() -> None:
    rig = Rig(max_resident_adapters=2)
    client = rig.submit(summing(0, "abc"))
    rig.take_outputs()

    assert isinstance(client.error, RequestTooLargeError)
    assert "3 adapters are to be added up; the engine's table of adapters has 2 places" in str(client.error)


MULTIPLYING: Mapping[str, tuple[Part, ...]] = {
    "in layer 0, q_proj has a factor on its outputs": (LowRank(4, 1.0), OutVector()),
    "in layer 0, q_proj has a factor on its inputs": (InVector(),),
    "in layer 0, q_proj has FLoRA, which multiplies what the base model computes": (Flora(1),),
    "q_proj has rows of tokens, which replace what the base model has": (Rows(1, 3),),
}


@pytest.mark.parametrize("what", MULTIPLYING)
@pytest.mark.parametrize("digests", ["ma", "am"])
def test_an_adapter_that_multiplies_is_refused_in_a_list_by_name_with_the_remedy(what: str, digests: str) -> None:
    spec = AdapterSpec("m", (ModuleSpec(0, "q_proj", MULTIPLYING[what]),))
    rig = Rig(images={"m": (spec, fake_image("m", 1, PAGE_BYTES))})
    client, alone = rig.submit(summing(0, digests)), rig.submit(make_submission(slot=1, adapter="m"))
    deliver_all(rig)
    rig.run()

    assert isinstance(client.error, InvalidParameterError)
    assert client.error.field == "adapters"
    assert f"adapter m cannot be added to others: {what}" in str(client.error)
    assert "name it alone" in str(client.error)
    check_tokens(alone)
    later = rig.submit(summing(2, digests))
    rig.take_outputs()
    assert isinstance(later.error, InvalidParameterError), "known now: refused before anything is fetched"


def test_an_activated_adapter_is_refused_in_a_list_by_name() -> None:
    spec = AdapterSpec("m", (ModuleSpec.low_rank(0, "q_proj", 8, 1.0),), is_activated=True)
    rig = Rig(images={"m": (spec, fake_image("m", 1, PAGE_BYTES))})
    client = rig.submit(summing(0, "am"))
    deliver_all(rig)
    rig.run()

    assert isinstance(client.error, InvalidParameterError)
    assert "adapter m cannot be added to others: it is activated by a sequence" in str(client.error)


@pytest.mark.parametrize("event", ["abort", "preempt", "queue", "session", "drain"])
def test_every_lease_and_claim_is_returned_once_however_a_request_ends(event: str, depth: int) -> None:
    rig = Rig(depth=depth, max_num_seqs=1)
    running, waiting = (
        rig.submit(summing(0, "ab", max_new_tokens=12)),
        rig.submit(summing(1, "bc", queue_deadline_s=105.0)),
    )
    deliver_all(rig)
    while not running.tokens:
        rig.turn()
    assert rig.cache.states.claims == {"b": 1, "c": 1}

    if event == "abort":
        rig.scheduler.abort(1, 0)
        rig.scheduler.abort(1, 1)
    elif event == "preempt":
        rig.scheduler.book.preempt(rig.scheduler.batch.requests[0])
    elif event == "queue":
        rig.now_s = 106.0
    elif event == "session":
        rig.scheduler.close_session(1)
    else:
        for digest in "abc":
            rig.cache.drop(digest)
    for _ in range(20):
        rig.turn()
        deliver_all(rig)
    rig.run()

    assert rig.scheduler.num_open == rig.cache.num_leases == 0
    assert rig.cache.states.claims == {}
    if event == "queue":
        assert isinstance(waiting.error, QueueTimeoutError)
    if event in ("preempt", "drain"):
        check_tokens(running, waiting)


def test_nothing_is_shared_across_lists_orders_and_weights() -> None:
    rig = Rig(num_pages=64)
    prompt = [10 + index % 7 for index in range(16)]
    variants = [("a", 1.0), ("ab", 1.0), ("ba", 1.0), ("ab", 0.5), ("abc", 1.0)]
    clients = []
    for slot, (digests, scale) in enumerate(variants * 2):
        clients.append(rig.submit(summing(slot, digests, scale=scale, prompt=prompt)))
        deliver_all(rig)
        rig.run()

    assert [client.num_cached for client in clients] == [0] * 5 + [12] * 5
    check_tokens(*clients)
    rig.check_finished()


def test_all_adapters_of_a_request_are_worth_more_than_one_that_no_request_asked_for() -> None:
    rig = Rig()
    rig.deliver("foretold", is_wanted=False)
    rig.submit(summing(0, "ab"))
    deliver_all(rig)
    rig.run()

    worth = {digest: rig.cache.states[digest].worth for digest in ("a", "b", "foretold")}
    assert worth["a"] == worth["b"] > worth["foretold"]


def test_a_tenant_is_charged_for_the_room_of_all_adapters_loaded_for_it() -> None:
    rig = Rig(block_tokens=4)
    rig.submit(summing(0, "ab", fairness_key="tenant", max_new_tokens=1))
    rig.deliver("a", 1)
    rig.deliver("b", 2)
    rig.run()

    assert rig.scheduler.queue.shares.service_of("tenant") == 3 * 4 + 4 + 2
