"""The step loop on its own thread: wake-ups, endings, failures, drains."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import (
    AdapterIncompatibleError,
    AdapterInUseError,
    AdapterNotFoundError,
    ConflictError,
    DeadlineError,
    DrainingError,
    InvalidParameterError,
    LoraplexError,
    SaturatedError,
    SlowConsumerError,
)
from loraplex_engine.messages import Abort, CloseSession, DropAdapter, FinishReason, ResidencyState, WantImage
from support.engine_harness import WAIT_S, add_fake_adapter, fake_engine
from support.fake_runner import FakeRunner

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("depth", [1, 2])
def test_prompts_with_and_without_adapters_run_together_and_leave_nothing(depth: int) -> None:
    with fake_engine(depth=depth, num_pages=12, num_arena_slots=6) as (harness, _):
        for digest in "abc":
            add_fake_adapter(harness, digest, num_pages=2)

        together = [harness.submit([slot, 2, 3], adapter=[None, *"abc"][slot % 4]) for slot in range(24)]
        harness.wait(together)
        alone = [harness.generate([[slot, 2, 3]], adapter=[None, *"abc"][slot % 4])[0] for slot in range(24)]

        assert [generation.tokens for generation in together] == alone
        harness.check_idle()


def test_a_stop_that_comes_while_a_turn_begins_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_engine() as (harness, _):
        loop = harness.engine._loop
        take_commands = loop._take_commands

        def stop_and_take_commands() -> None:
            loop._is_stopping = True
            loop._inbox.wake()
            take_commands()

        monkeypatch.setattr(loop, "_take_commands", stop_and_take_commands)
        loop._inbox.wake()
        loop._thread.join(WAIT_S)

        assert not loop._thread.is_alive()


def test_an_idle_loop_does_not_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_engine() as (harness, _):
        harness.generate([[1, 2, 3]])
        sequence = harness.engine.snapshot().sequence
        turns = []
        original = harness.engine._loop._turn

        def count_turn() -> None:
            turns.append(1)
            original()

        monkeypatch.setattr(harness.engine._loop, "_turn", count_turn)
        harness.engine.list_adapters().result(WAIT_S)
        time.sleep(0.3)  # the claim is about time passing

        assert len(turns) <= 2
        assert harness.engine.snapshot().sequence == sequence


def test_a_finished_load_wakes_the_loop() -> None:
    with fake_engine(loads_at_once=False) as (harness, runner):
        add_fake_adapter(harness, "a")
        generation = harness.submit([1, 2, 3], adapter="a")
        _wait_for(lambda: bool(runner.loading))
        assert generation.end is None

        harness.engine._call(lambda: None).result(WAIT_S)
        runner.finish_load(runner.loading[0])

        harness.wait([generation])
        assert generation.num_loading >= 1


def test_a_deadline_wakes_an_idle_loop() -> None:
    with fake_engine(loads_at_once=False) as (harness, _):
        add_fake_adapter(harness, "a")
        generation = harness.submit([1, 2, 3], adapter="a", deadline_s=time.monotonic() + 0.05)

        harness.wait([generation])

        assert generation.end is not None
        assert isinstance(generation.end.error, DeadlineError)


def test_an_unknown_adapter_ends_the_request_with_the_stores_error() -> None:
    with fake_engine() as (harness, _):
        (generation,) = harness.wait([harness.submit([1], adapter="nope")])

        assert generation.end is not None
        assert isinstance(generation.end.error, AdapterNotFoundError)


@pytest.mark.parametrize("is_pushed", [False, True], ids=["wanted", "pushed"])
def test_an_adapter_the_runner_cannot_compute_ends_only_its_own_requests(is_pushed: bool) -> None:
    with fake_engine(num_arena_slots=4) as (harness, runner):
        for digest in ("bad", "good"):
            add_fake_adapter(harness, digest, num_pages=2)
        runner.incompatible["bad"] = AdapterIncompatibleError("rank 300 is too much")
        if is_pushed:
            harness.add_image("bad")

        refused, *served = harness.wait([harness.submit([1], adapter=digest) for digest in ("bad", "good", None)])

        assert refused.end is not None
        assert isinstance(refused.end.error, AdapterIncompatibleError)
        assert all(generation.end is not None and generation.end.error is None for generation in served)
        assert harness.engine.arena.num_free == 2, "the refused image's slots are free again"
        assert not harness.crashes
        harness.check_idle()


def test_a_runner_that_cannot_bind_an_adapter_ends_its_requests_and_may_bind_it_later() -> None:
    with fake_engine(num_arena_slots=4, max_resident_adapters=1) as (harness, runner):
        add_fake_adapter(harness, "a", num_pages=2)
        runner.unbindable["a"] = SaturatedError("the table is full", retry_after_s=1.0)

        refused = harness.wait([harness.submit([1], adapter="a") for _ in range(3)])
        harness.check_idle()
        assert harness.engine.arena.num_free == 4
        runner.unbindable.clear()
        (served,) = harness.wait([harness.submit([1], adapter="a")])

        for generation in refused:
            assert generation.end is not None
            assert isinstance(generation.end.error, SaturatedError)
        assert served.end is not None
        assert served.end.error is None
        assert not harness.crashes
        harness.check_idle()


def test_abort_ends_a_running_request() -> None:
    with fake_engine(num_pages=512, max_model_len=2000) as (harness, _):
        generation = harness.submit([1, 2, 3], max_new_tokens=1900)
        harness.wait_until(lambda: len(generation.tokens) > 3)

        harness.engine.post(Abort(harness.outbox.session_id, generation.session_slot))
        harness.wait([generation])

        assert generation.end is not None
        assert generation.end.finish_reason is FinishReason.CANCELLED
        harness.check_idle()


def test_closing_a_session_ends_its_requests_and_its_outbox() -> None:
    with fake_engine(num_pages=512, max_model_len=2000) as (harness, _):
        other = harness.engine.open_session()
        harness.submit([1, 2, 3], max_new_tokens=1900, outbox=other)

        harness.engine.post(CloseSession(other.session_id))
        harness.engine.list_adapters().result(WAIT_S)

        harness.check_idle()
        while other.wait(0) is not None:
            pass


def test_reusing_an_open_slot_breaks_only_that_session() -> None:
    with fake_engine(num_pages=512, max_model_len=2000) as (harness, _):
        broken = harness.engine.open_session()
        for _ in range(2):
            harness.submit([1, 2, 3], max_new_tokens=1900, outbox=broken, session_slot=5)
        harness.engine.list_adapters().result(WAIT_S)

        _wait_for(lambda: broken._is_closed)
        while broken._pending:
            broken.take()
        with pytest.raises(InvalidParameterError, match="open request 5"):
            broken.take()
        assert harness.generate([[1, 2]])


def test_a_reader_that_falls_behind_loses_its_session_and_only_its_own() -> None:
    with fake_engine(num_pages=512, max_model_len=2000, max_backlog_bytes=600) as (harness, _):
        slow = harness.engine.open_session()
        harness.submit([1, 2, 3], max_new_tokens=1900, outbox=slow)
        _wait_for(lambda: slow._is_closed)

        with pytest.raises(SlowConsumerError):
            slow.take()
        harness.engine.list_adapters().result(WAIT_S)
        harness.check_idle()


def test_an_exception_in_the_loop_ends_every_request_and_is_told() -> None:
    with fake_engine(loads_at_once=False) as (harness, runner):
        add_fake_adapter(harness, "a")
        waiting = harness.submit([1], adapter="a")
        _wait_for(lambda: bool(runner.loading))
        runner.raise_on_launch = RuntimeError("device lost")

        running = harness.submit([1, 2, 3])
        harness.wait([running, waiting])

        for generation in (running, waiting):
            assert generation.end is not None
            assert isinstance(generation.end.error, LoraplexError)
            assert generation.end.error.reason == "INTERNAL"
            assert "device lost" in str(generation.end.error)
        _wait_for(lambda: bool(harness.crashes))
        assert not harness.engine.is_healthy


def test_after_a_crash_everything_is_refused_at_once() -> None:
    with fake_engine() as (harness, runner):
        runner.raise_on_launch = RuntimeError("device lost")
        harness.wait([harness.submit([1])])
        _wait_for(lambda: bool(harness.crashes))

        with pytest.raises(LoraplexError, match="device lost"):
            harness.engine.list_adapters().result(WAIT_S)
        with pytest.raises(LoraplexError, match="device lost"):
            harness.engine.drain(1).result(WAIT_S)
        with pytest.raises(LoraplexError, match="device lost"):
            harness.engine.grant_slots("a", 1, is_wanted=True).result(WAIT_S)


def test_draining_lets_requests_finish_and_refuses_new_ones() -> None:
    with fake_engine() as (harness, _):
        old = harness.submit([1, 2, 3], max_new_tokens=30)
        drained = harness.engine.drain(WAIT_S)
        new = harness.submit([1])
        harness.wait([old, new])

        assert drained.result(WAIT_S) == 0
        assert old.end is not None
        assert old.end.finish_reason is FinishReason.LENGTH
        assert new.end is not None
        assert isinstance(new.end.error, DrainingError)
        assert harness.engine.snapshot().draining


def test_draining_ends_what_outlasts_its_time() -> None:
    with fake_engine(loads_at_once=False) as (harness, _):
        add_fake_adapter(harness, "a")
        stuck = harness.submit([1, 2, 3], adapter="a")

        drained = harness.engine.drain(0.05)
        harness.wait([stuck])

        assert drained.result(WAIT_S) == 1
        assert stuck.end is not None
        assert isinstance(stuck.end.error, DrainingError)


def test_close_ends_open_requests_and_the_thread() -> None:
    with fake_engine(loads_at_once=False) as (harness, runner):
        add_fake_adapter(harness, "a")
        stuck = harness.submit([1, 2, 3], adapter="a")
        harness.engine.list_adapters().result(WAIT_S)

        harness.engine.close()

        harness.wait([stuck])
        assert stuck.end is not None
        assert isinstance(stuck.end.error, DrainingError)
        assert runner.is_closed
        assert not [thread for thread in threading.enumerate() if thread is harness.engine._loop._thread]


def test_operators_pin_unpin_and_evict() -> None:
    with fake_engine() as (harness, _):
        add_fake_adapter(harness, "a", num_pages=3)
        engine = harness.engine
        with pytest.raises(AdapterNotFoundError):
            engine.pin("a").result(WAIT_S)
        harness.add_image("a")

        assert engine.pin("a").result(WAIT_S).is_pinned
        _wait_for(lambda: engine.list_adapters().result(WAIT_S)[0].state is ResidencyState.RESIDENT)
        _wait_for(lambda: engine.snapshot().pages_pinned == 3)
        with pytest.raises(AdapterInUseError):
            engine.evict("a").result(WAIT_S)
        status = engine.unpin("a").result(WAIT_S)
        assert not status.is_pinned
        with pytest.raises(ConflictError):
            engine.evict("a", require_generation=status.generation + 1).result(WAIT_S)
        status = engine.evict("a", require_generation=status.generation).result(WAIT_S)
        assert status.state is ResidencyState.IN_ARENA
        _wait_for(lambda: engine.snapshot().pages_free == engine.snapshot().pages_total)


def test_a_dropped_adapter_is_gone_and_can_come_again() -> None:
    with fake_engine() as (harness, _):
        add_fake_adapter(harness, "a")
        first = harness.generate([[1, 2]], adapter="a")

        harness.engine.post(DropAdapter("a"))
        assert harness.engine.list_adapters().result(WAIT_S) == []
        assert harness.engine.arena.num_free == harness.engine.arena.num_slots

        assert harness.generate([[1, 2]], adapter="a") == first
        assert sum(isinstance(event, WantImage) for event in harness.store_events) == 2


def test_residency_sequences_have_no_gap() -> None:
    with fake_engine(num_pages=6) as (harness, _):
        for digest in "abcdef":
            add_fake_adapter(harness, digest, num_pages=2)
        for digest in "abcdefabc":
            harness.generate([[1, 2]], adapter=digest, max_new_tokens=3)

        sequences = [event.sequence for event in harness.store_events if not isinstance(event, WantImage)]
        assert sequences == list(range(1, len(sequences) + 1))


def test_a_wanted_image_waits_for_room_in_the_arena() -> None:
    with fake_engine(num_pages=32, num_arena_slots=2) as (harness, _):
        for digest in "abcd":
            add_fake_adapter(harness, digest, num_pages=2)

        generations = [harness.submit([1, 2], adapter=digest) for digest in "abcd" * 3]
        harness.wait(generations)

        assert all(generation.end is not None and generation.end.error is None for generation in generations)
        assert harness.engine.arena.num_free in (0, 2)


def test_requests_from_many_threads_each_end_once() -> None:
    with fake_engine(depth=2, num_pages=24) as (harness, _):
        add_fake_adapter(harness, "a", num_pages=2)
        lock = threading.Lock()
        generations = []

        def send(thread: int) -> None:
            for number in range(20):
                with lock:  # the harness numbers requests
                    generations.append(harness.submit([thread, number], adapter="a" if number % 2 else None))

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        harness.wait(generations)

        assert all(len(generation.tokens) == 16 for generation in generations)
        harness.check_idle()


def test_a_runner_that_cannot_be_built_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such model")

    monkeypatch.setattr(FakeRunner, "__init__", fail)
    with pytest.raises(RuntimeError, match="no such model"), fake_engine():
        pass

    assert threading.active_count() == before


def _wait_for(is_done: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_done():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
