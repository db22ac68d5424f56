"""The engine as one object: pool, arena, scheduler and step loop, built from parameters and a runner.

Services, benchmarks and tests drive the same object; nothing here knows of gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar, cast

from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.adapters.cache import AdapterCache
from loraplex_engine.limits import EngineParams
from loraplex_engine.loop.adapter_operations import AdapterOperations
from loraplex_engine.loop.arena_grants import ArenaGrants
from loraplex_engine.loop.load_report import LoadReport
from loraplex_engine.loop.outbox import SessionOutbox
from loraplex_engine.loop.parts import LoopParts
from loraplex_engine.loop.step_loop import EngineLoop
from loraplex_engine.loop.step_times import StepTimes
from loraplex_engine.messages import Call, Command, LoadSnapshot, StoreEvent
from loraplex_engine.pages.page_pool import PagePool
from loraplex_engine.scheduler.scheduler import Scheduler
from loraplex_engine.step import ModelRunner

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec

    from loraplex_engine.adapters.adapter import AdapterStatus
    from loraplex_engine.adapters.warm_order import WarmCounts
    from loraplex_engine.limits import SchedulerCounters
    from loraplex_engine.loop.totals import LoopTotals

T = TypeVar("T")


RunnerFactory = Callable[[EngineParams], ModelRunner]


class Engine:
    """A running engine. All methods may be called from any thread unless they say otherwise.

    Args:
        params: Sizes and limits.
        runner_factory: Makes the compute backend; called once, in the constructor.
        on_store_event: Gets `WantImage` and `ResidencyChanged`, on the loop's thread, in order; must be quick
            (``asyncio_loop.call_soon_threadsafe(queue.put_nowait, event)``).
        on_crash: Called once, on a thread of the engine, if the step loop dies, or hangs (EngineHungError); the engine
            then refuses every command.

    Attributes:
        params: Sizes and limits.
        arena: Host memory for images; any thread may write into granted slots of its `view`.
    """

    def __init__(
        self,
        params: EngineParams,
        runner_factory: RunnerFactory,
        *,
        on_store_event: Callable[[StoreEvent], None],
        on_crash: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.params = params
        self._clock = clock
        self._pool = PagePool(params.num_pages)
        self.arena = HostArena(params.num_arena_slots, params.geometry.page_bytes)
        try:
            self._cache = AdapterCache(
                pool=self._pool,
                arena=self.arena,
                max_resident=params.max_resident_adapters,
                emit=on_store_event,
                clock=clock,
                half_life_s=params.policy.half_life_s,
            )
            self._operations = AdapterOperations(cache=self._cache, pool=self._pool)
            self._scheduler = Scheduler(
                limits=params,
                pool=self._pool,
                cache=self._cache,
                page_bytes=params.geometry.page_bytes,
                clock=clock,
            )
            self._grants = ArenaGrants(cache=self._cache, arena=self.arena, queue=self._scheduler.queue)
            self._report = LoadReport(scheduler=self._scheduler, pool=self._pool, cache=self._cache, now_s=clock())
            runner = self._runner = runner_factory(params)
            runner.pin_host_memory(self.arena.view)
            parts = LoopParts(
                scheduler=self._scheduler,
                cache=self._cache,
                grants=self._grants,
                arena=self.arena,
                runner=runner,
                report=self._report,
                times=StepTimes(self._scheduler.costs, params.geometry, backend=runner.backend),
            )
        except BaseException:
            self.arena.close()
            raise
        self._loop = EngineLoop(parts, on_crash=on_crash, patience_s=params.step_patience_s, clock=clock)
        self._loop.start()

    def post(self, command: Command) -> None:
        """Hand a command to the step loop; never blocks."""
        self._loop.post(command)

    def open_session(self) -> SessionOutbox:
        """Open a session; each `Submission` of it carries its ``session_id``. Close it by posting `CloseSession`."""
        return self._loop.open_session(
            lambda session_id: SessionOutbox(
                session_id,
                max_backlog_bytes=self.params.max_backlog_bytes,
                max_backlog_s=self.params.max_backlog_s,
                clock=self._clock,
            )
        )

    def snapshot(self) -> LoadSnapshot:
        """Return the load after the latest step; never blocks."""
        return self._report.read(self._clock())

    @property
    def backend(self) -> str:
        """Name of the compute backend: ``torch`` or ``cuda``."""
        return self._runner.backend

    @property
    def totals(self) -> LoopTotals:
        """Where the step loop has spent its time."""
        return self._loop.totals

    @property
    def counters(self) -> SchedulerCounters:
        """Totals of requests so far."""
        return self._scheduler.counters

    @property
    def warm(self) -> WarmCounts:
        """What became of adapters that were loaded before a request asked for them."""
        return self._cache.warm

    @property
    def num_evicted_blocks(self) -> int:
        """Cached blocks evicted so far."""
        return self._scheduler.prefix.num_evicted

    @property
    def measured_costs(self) -> dict[str, float]:
        """Seconds that operations take, as measured lately: operation -> seconds."""
        steps, copies = self._scheduler.costs, self._cache.ranking.costs
        return {
            "decode_step": steps.decode_step_s,
            "prefill_token": steps.prefill_s_per_token,
            "copied_page": copies.copy_s_per_page,
            "fetched_image": copies.fetch_s,
        }

    @property
    def num_leases(self) -> int:
        """Leases of running requests on adapters."""
        return self._cache.num_leases

    def list_adapters(self) -> Future[list[AdapterStatus]]:
        """Ask for all adapters that the engine knows, WANTED ones included, by digest.

        From asyncio: ``await asyncio.wrap_future(engine.list_adapters())``. The same holds for every future of this
        class.
        """
        return self._call(self._cache.states.statuses)

    def pin(self, digest: str) -> Future[AdapterStatus]:
        """Keep an adapter in the pool whatever the pressure; it is loaded if it is only in the arena.

        The future raises AdapterNotFoundError if the engine does not hold it, SaturatedError if pins take too much.
        """
        return self._call(lambda: self._operations.pin(digest))

    def unpin(self, digest: str) -> Future[AdapterStatus]:
        """Make an adapter evictable again; AdapterNotFoundError if the engine does not hold it."""
        return self._call(lambda: self._operations.unpin(digest))

    def evict(self, digest: str, require_generation: int | None = None) -> Future[AdapterStatus]:
        """Free an adapter's pages once its last lease is returned; its image stays in the arena.

        The future raises AdapterNotFoundError, ConflictError if the generation is another, or AdapterInUseError if the
        adapter is pinned.
        """
        return self._call(lambda: self._operations.evict(digest, require_generation))

    def grant_slots(self, digest: str, num_pages: int, *, is_wanted: bool) -> Future[tuple[int, ...] | None]:
        """Ask for arena slots for an image on offer.

        A wanted image waits for room (cancel the future if the store goes away). Its future resolves to None if no
        request wants the image any more, or if it can never fit. An unwanted image's future resolves to None at once if
        there is no idle room, or if the engine has the image. Slots granted are given back by `return_slots`, or handed
        over by posting `ImageArrived`.
        """
        future: Future[tuple[int, ...] | None] = Future()
        asked = self._call(lambda: self._grants.ask(digest, num_pages, is_wanted=is_wanted, future=future))
        asked.add_done_callback(lambda done: _pass_failure_on(done, future))
        return future

    def check_adapter(self, spec: AdapterSpec) -> None:
        """Return if the compute backend can serve an adapter; called before its image travels.

        Raises:
            AdapterIncompatibleError: If the backend cannot serve it; the message names module, rank and remedy.
        """
        self._runner.check_adapter(spec)

    def return_slots(self, slots: tuple[int, ...]) -> None:
        """Give granted slots back unused, as the transfer failed."""
        self.arena.free(slots)
        self._call(self._grants.serve)

    def drain(self, timeout_s: float) -> Future[int]:
        """Refuse new requests (DrainingError), let the others finish for ``timeout_s``, then end them.

        The future resolves, once no request is left, to the number of requests ended before their time.
        """
        return self._loop.drain(timeout_s)

    def undrain(self) -> Future[object]:
        """Take requests again; drains under way end with ConflictError. The future resolves once it is done."""
        return self._loop.undrain()

    def check_integrity(self) -> Future[None]:
        """Recount pages, leases, slots and requests; the future raises RuntimeError if something is lost."""
        return self._call(self._check_integrity)

    @property
    def is_healthy(self) -> bool:
        """False once the step loop has ended."""
        return self._loop.is_alive

    def close(self) -> None:
        """End all requests with DrainingError, stop the loop, free device and arena. Not from the loop's thread.

        A loop that hangs keeps device and arena: only the end of the process frees them.
        """
        if self._loop.stop():
            self.arena.close()

    def _call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the loop's thread between two steps."""
        future: Future[T] = Future()
        self._loop.post(Call(function, cast("Future[object]", future)))
        return future

    def _check_integrity(self) -> None:
        self._scheduler.check_integrity()
        self.arena.check_integrity()


def _pass_failure_on(done: Future[None], future: Future[tuple[int, ...] | None]) -> None:
    error = done.exception()
    if error is not None and future.set_running_or_notify_cancel():
        future.set_exception(error)
