"""The engine as one object: pool, arena, scheduler and step loop, built from parameters and a runner.

Services, benchmarks and tests drive the same object; nothing here knows of gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar, cast

from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.limits import EngineLimits
from loraplex_engine.loop.adapter_operations import AdapterOperations
from loraplex_engine.loop.calls import failing_into
from loraplex_engine.loop.engine_state import EngineState
from loraplex_engine.loop.load_report import LoadReport, LoadSnapshot
from loraplex_engine.loop.outbox import SessionOutbox
from loraplex_engine.loop.pool_reading import PoolReading, read_pool
from loraplex_engine.loop.step_loop import EngineLoop
from loraplex_engine.loop.step_times import StepTimes
from loraplex_engine.messages import Call, Command, StoreEvent
from loraplex_engine.model_runner import ModelRunner

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec, Geometry

    from loraplex_engine.adapters.adapter import AdapterStatus
    from loraplex_engine.adapters.warm_order import WarmCounts
    from loraplex_engine.constraints.types import MaskFiller
    from loraplex_engine.limits import SchedulerCounters
    from loraplex_engine.loop.totals import LoopTotals

T = TypeVar("T")


RunnerFactory = Callable[[EngineLimits], ModelRunner]


class Engine:
    """A running engine. All methods may be called from any thread unless they say otherwise.

    Args:
        limits: What bounds it.
        runner_factory: Makes the compute backend; called once, in the constructor.
        on_store_event: Gets `WantImage` and `ResidencyChanged`, on the loop's thread, in order; must be quick
            (``asyncio_loop.call_soon_threadsafe(queue.put_nowait, event)``).
        on_crash: Called once, on a thread of the engine, if the step loop dies, or hangs (EngineHungError); the engine
            then refuses every command.
        clock: Seconds, monotonic.
        filler: Fills the masks of structured outputs; None if no request has one.
        arena: Host memory for images that the runner knows already, with as many slots; closed here.

    Attributes:
        limits: What bounds it.
        arena: Host memory for images; its `views` may be written in granted slots from any thread.
    """

    def __init__(
        self,
        limits: EngineLimits,
        runner_factory: RunnerFactory,
        *,
        on_store_event: Callable[[StoreEvent], None],
        on_crash: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
        filler: MaskFiller | None = None,
        arena: HostArena | None = None,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self.arena = arena or HostArena(limits.num_arena_slots, limits.page_bytes)
        try:
            state = self._state = EngineState(limits, self.arena, emit=on_store_event, clock=clock, filler=filler)
            runner = self._runner = runner_factory(limits)
            runner.pin_host_memory(self.arena.view)
            times = StepTimes(state.scheduler.costs, runner.geometry, backend=runner.backend)
        except BaseException:
            self.arena.close()
            raise
        self._operations = AdapterOperations(cache=state.cache, pool=state.pool)
        self._report = LoadReport(state, now_s=clock())
        self._loop = EngineLoop(state, runner, report=self._report, times=times, on_crash=on_crash, clock=clock)
        self._loop.start()

    def post(self, command: Command) -> None:
        """Hand a command to the step loop; never blocks."""
        self._loop.post(command)

    def open_session(self) -> SessionOutbox:
        """Open a session; each `Submission` of it carries its ``session_id``. Close it by posting `CloseSession`."""
        return self._loop.open_session(
            lambda session_id: SessionOutbox(
                session_id,
                max_backlog_bytes=self.limits.max_backlog_bytes,
                max_backlog_s=self.limits.max_backlog_s,
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
    def geometry(self) -> Geometry:
        """What adapter images must be laid out for."""
        return self._runner.geometry

    @property
    def weight_norms(self) -> tuple[float, ...]:
        """Frobenius norms of the base's weights, for each layer and projection in the geometry's order; may be empty."""
        return self._runner.weight_norms

    @property
    def totals(self) -> LoopTotals:
        """Where the step loop has spent its time."""
        return self._loop.totals

    @property
    def counters(self) -> SchedulerCounters:
        """What happened to requests so far."""
        return self._state.scheduler.counters

    @property
    def warm(self) -> WarmCounts:
        """What became of adapters that were loaded before a request asked for them."""
        return self._state.cache.warm

    @property
    def num_evicted_blocks(self) -> int:
        """Cached blocks that gave way so far."""
        return self._state.scheduler.prefix.num_evicted

    @property
    def page_seconds(self) -> dict[str, float]:
        """Integrals over time of the pool's pages: owner -> page-seconds; pages that are free or retiring are left out."""
        integrals = self._state.pool.page_seconds
        return {owner.name.lower(): integral.read() for owner, integral in integrals.items()}

    @property
    def leased_page_seconds(self) -> float:
        """The part of the adapters' page-seconds in which requests used them."""
        return self._state.scheduler.book.leases.total.read()

    @property
    def measured_costs(self) -> dict[str, float]:
        """Seconds that things take, as measured lately: what -> seconds."""
        steps, copies = self._state.scheduler.costs, self._state.cache.ranking.costs
        return {
            "decode_step": steps.decode_step_s,
            "prefill_token": steps.prefill_s_per_token,
            "copied_page": copies.copy_s_per_page,
            "fetched_image": copies.fetch_s,
        }

    @property
    def num_leases(self) -> int:
        """Leases of running requests on adapters."""
        return self._state.cache.num_leases

    def list_adapters(self) -> Future[list[AdapterStatus]]:
        """Ask for all adapters that the engine knows, WANTED ones included, by digest.

        From asyncio: ``await asyncio.wrap_future(engine.list_adapters())``. The same holds for every future of this
        class.
        """
        return self._call(self._state.cache.states.statuses)

    def read_pool(self) -> Future[PoolReading]:
        """Ask for the owner of each page, the open requests and the adapters on the device."""
        return self._call(lambda: read_pool(self._state, self._clock()))

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

    def grant_slots(
        self, digest: str, num_pages: int, *, is_wanted: bool, is_expected: bool = False
    ) -> Future[tuple[int, ...] | None]:
        """Ask for arena slots for an image on offer.

        A wanted image waits for room (cancel the future if the store goes away). Its future resolves to None if no
        request wants the image any more, or if it can never fit. An unwanted image's future resolves to None at once if
        there is no idle room, or if the engine has the image; for an expected one, images that no request waits with
        are evicted. Slots granted are given back by `return_slots`, or handed
        over by posting `ImageArrived`.
        """
        future: Future[tuple[int, ...] | None] = Future()

        def ask() -> None:
            self._state.grants.ask(digest, num_pages, is_wanted=is_wanted, is_expected=is_expected, future=future)

        self._loop.post(Call(ask, failing_into(future)))
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
        self._call(self._state.grants.serve)

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
        return self._call(self._state.check_integrity)

    @property
    def is_healthy(self) -> bool:
        """False once the step loop has ended."""
        return self._loop.is_alive

    def give_up(self, trouble: str) -> None:
        """End every session with EngineHungError, so that gateways move the requests: the runner cannot go on.

        Args:
            trouble: What has happened, for the message; ``on_crash`` gets it, too.
        """
        self._loop.give_up(trouble)

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
