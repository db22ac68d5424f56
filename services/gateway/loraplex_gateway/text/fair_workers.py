"""Work that would hold up the event loop, on a few threads: bounded in bytes, fair to every tenant."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from loraplex_common.errors import SaturatedError

T = TypeVar("T")

MIB: Final = 1024 * 1024
NUM_THREADS: Final = max(2, min(8, (os.cpu_count() or 1) // 2))
# What takes a few milliseconds at most; anything longer may use all threads but one.
SMALL_BYTES: Final = 64 * 1024
MAX_BYTES: Final = 128 * MIB
MAX_TENANT_BYTES: Final = 32 * MIB
RETRY_S: Final = 2.0
# After work of this size memory goes back to the system: a tokenizer takes 200 times its text, and the C library keeps what
# is freed in the arenas of the threads that took it.
TRIM_BYTES: Final = 256 * 1024
TRIM_AFTER_S: Final = 0.5


@dataclass(eq=False, kw_only=True, slots=True)
class _Work:
    call: Callable[[], Any]
    tenant: str
    num_bytes: int
    lane: _Lane
    done: asyncio.Future[Any]


class _Lane:
    """Work of one size; tenants take turns, each one's own is first come, first served."""

    def __init__(self, max_bytes: int, max_tenant_bytes: int) -> None:
        self.by_tenant: dict[str, deque[_Work]] = {}
        self.num_running = 0
        self._max_bytes = max_bytes
        self._max_tenant_bytes = max_tenant_bytes
        self._held: dict[str, int] = {}  # bytes that wait or run, by tenant

    @property
    def is_idle(self) -> bool:
        return not (self._held or self.by_tenant or self.num_running)

    def check_room(self, tenant: str, num_bytes: int) -> None:
        held = self._held.get(tenant, 0)
        is_tenants = bool(held) and held + num_bytes > self._max_tenant_bytes
        if is_tenants or (self._held and sum(self._held.values()) + num_bytes > self._max_bytes):
            whose = "of this tenant" if is_tenants else "of all tenants"
            raise SaturatedError(
                f"too many bytes {whose} wait to be prepared; try again, or send shorter prompts",
                retry_after_s=RETRY_S,
                drop_reason="rejected-saturated",
            )

    def add(self, work: _Work) -> None:
        self._held[work.tenant] = self._held.get(work.tenant, 0) + work.num_bytes
        self.by_tenant.setdefault(work.tenant, deque()).append(work)

    def take(self) -> _Work:
        tenant = next(iter(self.by_tenant))
        waiting = self.by_tenant.pop(tenant)
        work = waiting.popleft()
        if waiting:
            self.by_tenant[tenant] = waiting  # behind all others
        self.num_running += 1
        return work

    def discard(self, work: _Work) -> None:
        """Forget work that still waits, if it does."""
        waiting = self.by_tenant.get(work.tenant)
        if waiting is None or work not in waiting:
            return
        waiting.remove(work)
        if not waiting:
            del self.by_tenant[work.tenant]
        self._release(work)

    def ended(self, work: _Work) -> None:
        self.num_running -= 1
        self._release(work)

    def _release(self, work: _Work) -> None:
        self._held[work.tenant] -= work.num_bytes
        if not self._held[work.tenant]:
            del self._held[work.tenant]


class FairWorkers:
    """Runs blocking work in threads.

    Small work never waits behind large work: large work leaves one thread free, and one thread is its own once it waits.
    Belongs to one event loop; only the work itself runs elsewhere.

    Args:
        num_threads: At least 2.
        max_bytes: Most bytes of all work of one size, small or large, that waits or runs.
        max_tenant_bytes: Most bytes of one tenant's work; a tenant without work here may bring one piece of any size.
    """

    def __init__(
        self, num_threads: int = NUM_THREADS, *, max_bytes: int = MAX_BYTES, max_tenant_bytes: int = MAX_TENANT_BYTES
    ) -> None:
        if num_threads < 2:
            raise ValueError(f"{num_threads} threads cannot keep small work apart from large")
        self._num_threads = num_threads
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="preparation")
        self._trim_timer: asyncio.TimerHandle | None = None
        self._small, self._large = _Lane(max_bytes, max_tenant_bytes), _Lane(max_bytes, max_tenant_bytes)

    async def run(self, call: Callable[[], T], *, tenant: str, num_bytes: int) -> T:
        """Return what `call` returns, from a thread, once its turn has come; cancelled while it waits, it never runs.

        Args:
            call: Touches nothing that the event loop's code changes.
            tenant: The tenant whose turn it takes.
            num_bytes: Size of its input, for the bounds.

        Raises:
            SaturatedError: If too many bytes wait already, of this tenant or of all.
        """
        lane = self._large if num_bytes > SMALL_BYTES else self._small
        lane.check_room(tenant, num_bytes)
        done = asyncio.get_running_loop().create_future()
        work = _Work(call=call, tenant=tenant, num_bytes=max(1, num_bytes), lane=lane, done=done)
        lane.add(work)
        self._start_waiting()
        try:
            result: T = await done
        except asyncio.CancelledError:
            lane.discard(work)
            raise
        return result

    def give_memory_back(self) -> None:
        """Have the C library return what is free to the system, a moment from now: something large has just been dropped."""
        if self._trim_timer is None:
            self._trim_timer = asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._trim)

    def close(self) -> None:
        """Start nothing more; what runs is left to end by itself."""
        if self._trim_timer is not None:
            self._trim_timer.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if anything is held although nothing waits or runs."""
        if not (self._small.is_idle and self._large.is_idle):
            raise RuntimeError("preparation still holds work")

    def _trim(self) -> None:
        self._trim_timer = None
        self._executor.submit(_give_memory_back)

    def _start_waiting(self) -> None:
        while (lane := self._next_lane()) is not None:
            work = lane.take()
            future = self._executor.submit(work.call)
            future.add_done_callback(self._in_loop(work))

    def _next_lane(self) -> _Lane | None:
        small, large = self._small, self._large
        if small.num_running + large.num_running >= self._num_threads:
            return None
        may_large = large.by_tenant and large.num_running < self._num_threads - 1
        if may_large and (large.num_running == 0 or not small.by_tenant):
            return large
        return small if small.by_tenant else None

    def _in_loop(self, work: _Work) -> Callable[[Future[Any]], None]:
        loop = work.done.get_loop()

        def on_done(future: Future[Any]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._ended, work, future)

        return on_done

    def _ended(self, work: _Work, future: Future[Any]) -> None:
        work.lane.ended(work)
        if future.cancelled():  # closed
            work.done.cancel()
            return
        self._start_waiting()
        if work.num_bytes > TRIM_BYTES:
            self.give_memory_back()
        if work.done.done():
            return
        if (error := future.exception()) is not None:
            work.done.set_exception(error)
        else:
            work.done.set_result(future.result())


def _give_memory_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
