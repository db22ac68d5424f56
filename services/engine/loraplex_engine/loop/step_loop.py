"""The step loop: one thread that turns commands into steps and steps into outputs, and does nothing else.

The loop sleeps only when there is nothing to compute; commands, finished loads and deadlines wake it, and it never
waits for a peer. A fault of one request ends that request only (`faults`). If the loop itself dies, every open request
ends with INTERNAL, later requests are refused, and ``on_crash`` is called. If the loop hangs, which another thread
notices (`step_watchdog`), sessions end with ENGINE_HUNG instead, so that gateways move their requests, and ``on_crash``
is called.
"""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import ConflictError, DrainingError, EngineHungError, InvalidParameterError, LoraplexError

from loraplex_engine.loop.adapter_loading import AdapterLoading
from loraplex_engine.loop.calls import failing_into, run_call
from loraplex_engine.loop.drains import Drain, Drains
from loraplex_engine.loop.inbox import Inbox, Sessions
from loraplex_engine.loop.step_watchdog import Pulse, StepWatchdog
from loraplex_engine.loop.steps_in_flight import StepsInFlight
from loraplex_engine.messages import Abort, Call, CloseSession, Command, DropAdapter, ImageArrived, ImageRefused, Submit
from loraplex_engine.scheduler.request_book import SlotInUseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.loop.engine_state import EngineState
    from loraplex_engine.loop.load_report import LoadReport
    from loraplex_engine.loop.outbox import SessionOutbox
    from loraplex_engine.loop.step_times import StepTimes
    from loraplex_engine.loop.totals import LoopTotals
    from loraplex_engine.model_runner import ModelRunner


JOIN_S: Final = 0.1


class EngineLoop:
    """Owner of the step loop's thread.

    Args:
        state: What it decides with; belongs to the loop's thread once that runs, the arena's allocator excepted.
        runner: What computes its steps.
        report: Told of the load after each turn.
        times: Says how long steps should take.
        on_crash: Called once, with what killed it; on the loop's thread, or on the watchdog's if it hangs.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        state: EngineState,
        runner: ModelRunner,
        *,
        report: LoadReport,
        times: StepTimes,
        on_crash: Callable[[BaseException], None],
        clock: Callable[[], float],
    ) -> None:
        self._scheduler, self._cache, self._grants = state.scheduler, state.cache, state.grants
        self._runner, self._report = runner, report
        self._on_crash = on_crash
        self._clock = clock
        self._sessions = Sessions()
        self._inbox = Inbox(self._sessions)
        self._is_stopping = False
        self._loading = AdapterLoading(state, runner, wake=self._inbox.wake)
        self._drains = Drains()
        self._num_ended_by_drain = 0
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)
        self._is_hung = False
        self._pulse = Pulse()
        self._steps = StepsInFlight(state.scheduler, runner, times=times, pulse=self._pulse, filler=state.filler)
        self._watchdog = StepWatchdog(
            self._pulse,
            has_work=lambda: self._inbox.has_commands,
            patience_s=state.limits.step_patience_s,
            on_hang=self.give_up,
        )

    # --- any thread ---

    @property
    def totals(self) -> LoopTotals:
        """Where the loop has spent its time."""
        return self._steps.totals

    @property
    def is_alive(self) -> bool:
        """False once the loop has ended, well or badly."""
        return self._inbox.is_open

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        self._watchdog.start()

    def post(self, command: Command) -> None:
        """Add a command to the inbox; a command after the loop's end is answered at once."""
        self._inbox.post(command)

    def open_session(self, make_outbox: Callable[[int], SessionOutbox]) -> SessionOutbox:
        """Register an outbox under a new session id."""
        return self._sessions.open(make_outbox)

    def drain(self, timeout_s: float) -> Future[int]:
        """Refuse new requests, let others finish for ``timeout_s``, then end them; resolves to how many it ended."""
        future: Future[int] = Future()
        drain = Drain(self._clock() + timeout_s, future)

        def begin() -> None:
            self._scheduler.start_draining()
            self._drains.add(drain)

        self.post(Call(begin, failing_into(future)))
        return future

    def undrain(self) -> Future[object]:
        """Take requests again; drains under way end with ConflictError. Resolves once requests are taken."""
        future: Future[object] = Future()
        self.post(Call(self._stop_draining, future))
        return future

    def stop(self) -> bool:
        """End all requests with DrainingError, then the thread; returns once the thread has ended or hangs.

        Returns:
            False if the thread hangs: it may still use all its objects.
        """
        self._is_stopping = True
        self._inbox.wake()
        if threading.current_thread() is not self._thread:
            while self._thread.is_alive() and not self._is_hung:
                self._thread.join(JOIN_S)
        self._watchdog.stop()
        return not self._is_hung or not self._thread.is_alive()

    # --- the loop's thread ---

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._turn()
            self._finish()
        except BaseException as error:
            if not self._is_hung:
                self._crash(error)
        finally:
            self._pulse.sleeps()

    def _turn(self) -> None:
        self._pulse.works()
        self._take_commands()
        self._loading.take_finished()
        self._advance_drains()
        began_s = time.perf_counter()
        plan = self._scheduler.schedule()
        self._steps.totals.schedule_s += time.perf_counter() - began_s
        self._grants.serve()
        self._loading.start()
        if plan is not None:
            self._steps.launch(plan)
        has_step = bool(self._steps)
        if has_step and (plan is None or self._steps.is_full):
            self._steps.complete()
        self._steps.draw()
        self._report.publish(self._clock())
        self._send()
        self._resolve_drains()
        if not has_step:
            self._sleep()

    def _sleep(self) -> None:
        if self._is_stopping:  # `stop` came before this turn took its commands, which forgot the wake-up
            return
        until_s = min(self._scheduler.next_deadline_s, self._drains.next_deadline_s)
        self._pulse.sleeps()
        self._inbox.wait(None if until_s == math.inf else max(0.0, until_s - self._clock()))

    def _take_commands(self) -> None:
        for command in self._inbox.take():
            self._handle(command)

    def _handle(self, command: Command) -> None:
        scheduler = self._scheduler
        match command:
            case Submit(submission):
                if submission.session_id in self._sessions:
                    self._submit(command)
            case Abort(session_id, session_slot):
                scheduler.abort(session_id, session_slot)
            case CloseSession(session_id):
                self._close_session(session_id, None)
            case ImageArrived():
                self._loading.image_arrived(command)
            case ImageRefused(digest, error):
                scheduler.image_refused(digest, error)
            case DropAdapter(digest):
                self._cache.drop(digest)
            case Call():
                run_call(command)

    def _submit(self, command: Submit) -> None:
        try:
            self._scheduler.submit(command.submission)
        except SlotInUseError as error:  # the gateway reuses a slot: nothing it says can be told apart any more
            self._close_session(command.submission.session_id, InvalidParameterError(str(error), field="slot"))

    def _close_session(self, session_id: int, error: LoraplexError | None) -> None:
        self._scheduler.close_session(session_id)
        self._sessions.close(session_id, error)

    def _send(self) -> None:
        for session_id, outputs in self._scheduler.take_outputs().items():
            if not self._sessions.put(session_id, outputs):
                self._close_session(session_id, None)  # closed for its backlog

    def _advance_drains(self) -> None:
        if self._drains.next_deadline_s <= self._clock():
            error = DrainingError("this engine is shutting down", drop_reason="rejected-shutting-down")
            self._num_ended_by_drain += self._scheduler.end_all(error)

    def _stop_draining(self) -> None:
        self._scheduler.stop_draining()
        self._drains.fail(ConflictError("Undrain has ended this drain: the engine takes requests again"))
        self._num_ended_by_drain = 0

    def _resolve_drains(self) -> None:
        if self._drains and self._scheduler.num_open == 0:
            self._drains.resolve(self._num_ended_by_drain)

    # --- the end ---

    def _finish(self) -> None:
        """End everything in order: requests first, then steps and loads in flight, then the device."""
        error = DrainingError("this engine is shutting down", drop_reason="rejected-shutting-down")
        if not self._is_hung:  # else sessions are told that requests go on elsewhere, and not that they end here
            self._take_commands()
            self._num_ended_by_drain += self._scheduler.end_all(error)
        while self._steps:
            self._steps.complete()
        self._send()
        self._resolve_drains()
        self._shut(error)
        self._runner.close()

    def give_up(self, trouble: str) -> None:
        """End every session, from another thread, as the loop's own hangs or cannot go on; gateways move the requests."""
        if self._is_hung:
            return
        error = EngineHungError(f"{trouble}; this engine ends")
        self._is_hung = self._is_stopping = True
        self._on_crash(error)  # first: the calls below take locks that the loop's thread may hold
        self._inbox.shut(error)
        self._drains.fail(error)
        self._sessions.close_all(error)

    def _crash(self, error: BaseException) -> None:
        """Tell every client, and the engine's owner through ``on_crash``; the accounts are not used any more."""
        internal = LoraplexError(f"the engine failed: {type(error).__name__}: {error}")
        self._send_rest(internal)
        self._shut(internal)
        self._on_crash(error)

    def _send_rest(self, error: LoraplexError) -> None:
        scheduler = self._scheduler
        for session_id, outputs in scheduler.take_outputs().items():
            self._sessions.put(session_id, outputs)
        for session_id, session_slot in scheduler.open_keys():
            self._sessions.refuse(session_id, session_slot, error)

    def _shut(self, error: LoraplexError) -> None:
        """Refuse the commands in the inbox and all later ones."""
        self._inbox.shut(error)
        self._grants.cancel()
        self._drains.fail(error)
        self._sessions.close_all()
