"""A request's wait for a place on this gateway, up to its deadline, its queue_timeout or its cancellation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import DeadlineError, LoraplexError, QueueTimeoutError

from loraplex_gateway.engines.ticket import LocalCancelError
from loraplex_gateway.types import Accepted, Queued

if TYPE_CHECKING:
    from typing import Self

    from loraplex_gateway.metrics.gateway import GatewayMetrics
    from loraplex_gateway.requests.admission import Place
    from loraplex_gateway.requests.claims import Claim
    from loraplex_gateway.requests.run import RequestRun

QUEUED_EVERY_S: Final = 1.0


class Waiting:
    """One request's wait; a block around it counts the request among those that wait.

    Args:
        place: What it waits for.
        claim: Tells when the request is cancelled by its id.
        run: The request.
        metrics: Where the wait is counted.
    """

    def __init__(self, place: Place, claim: Claim, run: RequestRun, metrics: GatewayMetrics) -> None:
        self._place = place
        self._claim = claim
        self._run = run
        self._metrics = metrics
        self._model = run.prepared.model.name
        self._demand = metrics.demand.waiting(run.prepared.model.fingerprint, len(run.prepared.prompt_ids))
        self._outcome = "cancelled"
        self._is_accepted = self._is_told = False

    def __enter__(self) -> Self:
        self._claim.on_cancel(lambda: self._place.give_up(LocalCancelError()))
        self._metrics.vllm.num_waiting[self._model] += 1
        self._demand.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        times = self._run.times
        self._claim.on_cancel(None)
        self._demand.__exit__(None, None, None)
        self._metrics.vllm.num_waiting[self._model] -= 1
        self._metrics.queue_duration.labels(self._outcome).observe(times.clock() - times.queued_at)

    async def next(self) -> Accepted | Queued | None:
        """Return that the request is here, then every `QUEUED_EVERY_S` seconds where it stands; None once it is admitted.

        A request that wants no progress events is told nothing.

        Raises:
            DeadlineError: If the deadline passes.
            QueueTimeoutError: If queue_timeout passes.
            LocalCancelError: If the request is cancelled by its id.
        """
        place, request = self._place, self._run.prepared.request
        tells = request.progress_events
        if tells and not self._is_accepted:
            self._is_accepted = True
            return Accepted(request_id=request.request_id)
        while not place.is_admitted:
            left_s = self._left_s()
            if left_s <= 0:
                self._outcome = "timeout"
                raise self._timed_out()
            self._is_told = tells and not self._is_told
            if self._is_told:
                return Queued(position=place.position, estimated_wait_s=place.estimated_wait_s)
            await asyncio.wait({place.admitted}, timeout=min(left_s, QUEUED_EVERY_S) if tells else left_s)
            if place.admitted.done():
                place.admitted.result()
        self._outcome = "admitted"
        self._run.admitted()
        return None

    def _left_s(self) -> float:
        prepared = self._run.prepared
        end = prepared.deadline if prepared.queue_deadline is None else min(prepared.deadline, prepared.queue_deadline)
        return end - self._run.times.clock()

    def _timed_out(self) -> LoraplexError:
        if self._run.times.clock() >= self._run.prepared.deadline:
            return DeadlineError("the deadline passed while the request waited for a place")
        return QueueTimeoutError(
            f"queue_timeout passed with {self._place.position} requests ahead",
            retry_after_s=self._place.estimated_wait_s,
            drop_reason="rejected-ttl-expired",
        )
