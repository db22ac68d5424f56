"""Takes new requests in: refuses some at once, and starts what the others need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import AdapterLoadingError, DrainingError, InvalidParameterError, LoraplexError

from loraplex_engine.faults import internal_error
from loraplex_engine.limits import EngineLimits, QueuePolicy
from loraplex_engine.messages import FinishReason, ResidencyState, Submission
from loraplex_engine.scheduler.request import Request, RequestState, make_request

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.scheduler.admission import Admission
    from loraplex_engine.scheduler.deadlines import TimeLimits
    from loraplex_engine.scheduler.feasibility import Feasibility
    from loraplex_engine.scheduler.request_book import RequestBook


class RequestIntake:
    """Takes new requests in.

    Args:
        limits: Longest sequence and objective.
        book: Gets every request.
        cache: Adapters; it is told of each arrival.
        feasibility: Refuses a request that can never fit.
        time_limits: Watches the limits that may pass while a request is open.
        admission: Starts to fetch adapters.

    Attributes:
        is_draining: True once new requests are refused.
    """

    def __init__(
        self,
        *,
        limits: EngineLimits,
        book: RequestBook,
        cache: AdapterCache,
        feasibility: Feasibility,
        time_limits: TimeLimits,
        admission: Admission,
    ) -> None:
        self._limits = limits
        self._book = book
        self._cache = cache
        self._feasibility = feasibility
        self._time_limits = time_limits
        self._admission = admission
        self._num_submitted = 0
        self.is_draining = False

    def submit(self, submission: Submission, now_s: float) -> None:
        """Take a request; it ends in exactly one `Ended`.

        Raises:
            SlotInUseError: If the session has an open request of this number.
        """
        policy = self._limits.policy
        try:
            request = make_request(
                submission,
                number=self._num_submitted,
                now_s=now_s,
                max_model_len=self._limits.max_model_len,
                ttft_slo_s=None if policy.queue_policy is QueuePolicy.FCFS else policy.ttft_slo_s,
            )
        except Exception as error:  # no other part knows the request yet
            doing = "while it was taken in"
            self._book.refuse(submission, internal_error(doing, error, request_id=submission.request_id))
            return
        self._book.open(request)
        self._num_submitted += 1
        with self._book.answering_for(request, "while it was taken in"):
            self._take_in(request, now_s)

    def _take_in(self, request: Request, now_s: float) -> None:
        if self.is_draining:
            self._book.fail(
                request, DrainingError("this engine is shutting down", drop_reason="rejected-shutting-down")
            )
        elif request.num_prompt_tokens >= self._limits.max_model_len:
            self._book.fail(request, self._prompt_too_long(request))
        elif len(request.output_token_ids) >= request.max_outputs:
            self._book.finish(request, FinishReason.LENGTH)
        elif request.submission.rules is not None and request.submission.rules.is_ended:
            self._book.finish(request, FinishReason.STOP)  # the resumed tokens are all that its structure allows
        elif not self._feasibility.refuse_if_unservable(request):
            self._time_limits.watch(request)
            self._arrive(request, now_s)

    def _prompt_too_long(self, request: Request) -> LoraplexError:
        return InvalidParameterError(
            f"the prompt has {request.num_prompt_tokens} tokens; with at least one output token that exceeds the "
            f"longest sequence of {self._limits.max_model_len}",
            field="prompt",
        )

    def _arrive(self, request: Request, now_s: float) -> None:
        for digest in request.digests:
            self._cache.states.count_arrival(digest)
        self._admission.arrive(request, now_s)
        lacking = [d for d in request.digests if self._cache.state_of(d) is not ResidencyState.RESIDENT]
        if not lacking or request.state is RequestState.ENDED:
            return
        if not request.submission.fail_fast:
            self._book.report_loading(request)
            return
        what = f"adapter {lacking[0]} is" if len(lacking) == 1 else f"adapters {', '.join(lacking)} are"
        error = AdapterLoadingError(
            f"{what} being loaded", retry_after_s=max(0.05, self._cache.ranking.costs.resident_s)
        )
        self._book.fail(request, error)
        for digest in lacking:
            if self._cache.state_of(digest) is ResidencyState.IN_ARENA:
                self._admission.load_unattended(digest, request.digests)
