"""All open requests: how they begin, lose their place and end, each with exactly one `Ended`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from loraplex_engine.faults import internal_error
from loraplex_engine.limits import SchedulerCounters
from loraplex_engine.messages import Ended, FinishReason, Loading, ResidencyState, Started
from loraplex_engine.scheduler.expected_lengths import ExpectedLengths
from loraplex_engine.scheduler.lease_seconds import LeaseSeconds
from loraplex_engine.scheduler.outputs import OutputCollector
from loraplex_engine.scheduler.request import Request, RequestState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loraplex_common.errors import LoraplexError

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.limits import EngineLimits
    from loraplex_engine.messages import Submission
    from loraplex_engine.scheduler.prefix_sharing import PrefixSharing
    from loraplex_engine.scheduler.running_batch import RunningBatch
    from loraplex_engine.scheduler.waiting_queue import WaitingQueue


_COURSE: Final = (
    ResidencyState.ABSENT,
    ResidencyState.WANTED,
    ResidencyState.IN_ARENA,
    ResidencyState.LOADING,
    ResidencyState.DRAINING,
    ResidencyState.RESIDENT,
)
"""States in the order in which an adapter comes; one that drains must leave before it can come again."""


class SlotInUseError(ValueError):
    """A session has two open requests of one number: the gateway breaks the protocol."""


class RequestBook:
    """Moves requests, with what they hold, between queue, batch and end, and tells their sessions.

    Args:
        limits: Size of a page, and the quantile of lengths that requests are expected to reach.
        queue: Waiting requests.
        batch: Running requests.
        cache: Adapters, which running requests lease and waiting ones claim.
        sharing: Keeps the blocks of requests that leave.

    Attributes:
        queue: Waiting requests.
        batch: Running requests.
        lengths: How many tokens requests drew lately.
        outputs: Events and tokens that have yet to be sent.
        counters: Totals so far.
        leases: Counts the page-seconds of leased adapters.
        last_launched: Number of the last step launched; pages and leases released now stay in use until it is done.
    """

    def __init__(
        self,
        *,
        limits: EngineLimits,
        queue: WaitingQueue,
        batch: RunningBatch,
        cache: AdapterCache,
        sharing: PrefixSharing,
        clock: Callable[[], float],
    ) -> None:
        self.queue = queue
        self.batch = batch
        self.lengths = ExpectedLengths(limits.policy.growth_quantile)
        self.outputs = OutputCollector()
        self.counters = SchedulerCounters()
        self.leases = LeaseSeconds(cache.states.num_pages_of, clock)
        self._cache = cache
        self._sharing = sharing
        self._page_bytes = limits.page_bytes
        self._clock = clock
        self._requests: dict[tuple[int, int], Request] = {}
        self._claiming_several: dict[int, Request] = {}  # by number
        self.last_launched = -1

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> list[Request]:
        """All open requests, as a copy."""
        return list(self._requests.values())

    @property
    def keys(self) -> list[tuple[int, int]]:
        """Session and session slot of each open request."""
        return list(self._requests)

    def find(self, session_id: int, session_slot: int) -> Request | None:
        """Return an open request."""
        return self._requests.get((session_id, session_slot))

    def open(self, request: Request) -> None:
        """Take a new request in and queue it.

        Raises:
            SlotInUseError: If its session has an open request of this number.
        """
        if request.key in self._requests:
            raise SlotInUseError(f"session {request.key[0]} has an open request {request.key[1]} already")
        self._requests[request.key] = request
        self.queue.add(request)

    def report_loading(self, request: Request) -> None:
        """Report how far a waiting request's adapters have come."""
        found = [self._cache.states.status(digest) for digest in request.digests]
        event = Loading(
            session_slot=request.submission.session_slot,
            state=min((each.state for each in found), key=_COURSE.index),
            bytes_done=sum(each.num_pages for each in found if each.is_in_arena) * self._page_bytes,
            bytes_total=sum(each.num_pages for each in found) * self._page_bytes,
        )
        self.outputs.event(request.submission.session_id, event)

    def start(self, request: Request) -> None:
        """Report that a request has got its place, unless it has only come back after a preemption."""
        self.leases.begin(request)
        self.counters.num_looked_up_tokens += request.num_known_tokens
        self.counters.num_cached_tokens += request.num_cached
        if request.admitted_s is not None:
            return
        request.admitted_s = self._clock()
        self.counters.num_prompt_tokens += request.num_prompt_tokens
        self.queue.shares.charge(request.share, request.num_known_tokens - request.num_cached)
        event = Started(
            session_slot=request.submission.session_slot,
            cached_tokens=min(request.num_cached, request.num_prompt_tokens),
            queue_s=request.admitted_s - request.arrived_s,
            adapter_load_s=request.adapter_load_s,
        )
        self.outputs.event(request.submission.session_id, event)

    def preempt(self, request: Request) -> None:
        """Take a running request's place away; the request computes its tokens anew when it is admitted again."""
        request.output_token_ids = self.batch.state.outputs(request.slot)
        self._vacate(request)
        request.move_to(RequestState.WAITING)
        self.queue.add(request)
        self.counters.num_preemptions += 1

    def claim(self, request: Request) -> None:
        """Let a waiting request without a claim claim its adapters."""
        for digest in request.digests:
            self._cache.states.claim(digest)
        request.has_claim = True
        if request.adds_up:
            self._claiming_several[request.number] = request

    def unclaim(self, request: Request) -> None:
        """Take back a waiting request's claim on its adapters, if it has one."""
        if request.has_claim:
            for digest in request.digests:
                self._cache.states.unclaim(digest)
            request.has_claim = False
            self._claiming_several.pop(request.number, None)

    def claimed_ahead_of(self, request: Request) -> set[str]:
        """Return the adapters claimed by parked requests with several, of a higher class or older than ``request``.

        An adapter that is resident has nothing to park for, so requests with one adapter are not among them.
        """
        place = (request.level, -request.number)
        claiming = self._claiming_several.values()
        ahead = (each for each in claiming if each.is_parked and (each.level, -each.number) > place)
        return {digest for each in ahead for digest in each.digests}

    def _vacate(self, request: Request) -> None:
        """Take slot, pages and leases of a request away; its full blocks stay in the prefix cache."""
        self._sharing.leave(request, self._clock())
        self.batch.unseat(request, self.last_launched)
        self.leases.end(request)
        self.queue.shares.cease_to_run(request.share)
        self.queue.uncap(request.share)
        for digest in request.digests:
            self._cache.release(digest, self.last_launched)

    @contextmanager
    def answering_for(self, request: Request, doing: str) -> Iterator[None]:
        """Fail a request by the exception that the block raises, and go on with the other requests.

        The block must leave nothing half done: when it raises, the request must hold all that the block took for it.
        Not meant for plain tokens: a steady step does no work for single requests.

        Args:
            request: The only request that the block works on.
            doing: Text for `internal_error`: what was being done.
        """
        try:
            yield
        except Exception as error:
            if request.state is RequestState.ENDED:
                raise  # it failed while it was ended: the accounts themselves are wrong
            request.is_suspect = True
            self.fail(request, internal_error(doing, error, request_id=request.submission.request_id))

    def refuse(self, submission: Submission, error: LoraplexError) -> None:
        """Answer a submission that no request could be made of."""
        self.outputs.event(submission.session_id, Ended(session_slot=submission.session_slot, error=error))

    def fail(self, request: Request, error: LoraplexError) -> None:
        """End a request with an error."""
        self._close(request, error=error)

    def finish(self, request: Request, reason: FinishReason, stop_token_id: int | None = None) -> None:
        """End a request normally."""
        self._close(request, finish_reason=reason, stop_token_id=stop_token_id)

    def _close(
        self,
        request: Request,
        *,
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
        error: LoraplexError | None = None,
    ) -> None:
        """End a request: take its slot, pages and leases, or its place in the queue, and send the one `Ended`."""
        if request.state is RequestState.RUNNING:
            self.lengths.observe(int(self.batch.state.num_outputs[request.slot]))
            self._vacate(request)
        else:
            self.queue.remove(request)
            self.unclaim(request)
        self.queue.shares.leave(request.share)
        request.move_to(RequestState.ENDED)
        del self._requests[request.key]
        now_s = self._clock()
        admitted_s = now_s if request.admitted_s is None else request.admitted_s
        first_token_s = now_s if request.first_token_s is None else request.first_token_s
        event = Ended(
            session_slot=request.submission.session_slot,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            error=error,
            queue_s=admitted_s - request.arrived_s,
            adapter_load_s=request.adapter_load_s,
            prefill_s=first_token_s - admitted_s,
            decode_s=now_s - first_token_s,
            kv_page_s=request.kv_page_s,
            adapter_page_s=request.adapter_page_s,
        )
        self.outputs.event(request.submission.session_id, event)
