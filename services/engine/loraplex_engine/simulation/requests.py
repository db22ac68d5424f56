"""A trace's requests as a gateway would submit them, and the answers that it would get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_engine.messages import Ended, FinishReason, ResidencyState, SessionEvent, Submission
from loraplex_engine.sampling_params import SamplingParams, StoppingParams
from loraplex_engine.simulation.outcomes import End, Found, Outcomes
from loraplex_engine.simulation.trace import NO_ADAPTER, TokenStreams

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.simulation.adapters import Adapters
    from loraplex_engine.simulation.trace import TraceArrays

SESSION: Final = 1
_GREEDY: Final = SamplingParams(temperature=0.0)
_NO_TOKENS: Final = np.empty(0, dtype=np.int32)
_FOUND: Final = {
    ResidencyState.RESIDENT: Found.RESIDENT,
    ResidencyState.LOADING: Found.COMING,
    ResidencyState.WANTED: Found.COMING,
    ResidencyState.DRAINING: Found.COMING,
    ResidencyState.IN_ARENA: Found.IN_ARENA,
    ResidencyState.ABSENT: Found.MISSING,
}


class TraceRequests:
    """Submits requests and records what became of them; a request's number in its session is its index in the trace."""

    def __init__(self, trace: TraceArrays, adapters: Adapters, outcomes: Outcomes, *, max_model_len: int) -> None:
        self._trace = trace
        self._adapters = adapters
        self._outcomes = outcomes
        self._streams = TokenStreams(trace, max_model_len)

    def submission(self, index: int, cache: AdapterCache) -> Submission:
        """Return a request, and record where its adapter is now."""
        trace = self._trace
        adapter = int(trace.adapter[index])
        digest = None
        if adapter != NO_ADAPTER:
            digest = self._adapters.digests[adapter]
            self._outcomes.found[index] = _FOUND[cache.state_of(digest)]
        return Submission(
            session_id=SESSION,
            session_slot=index,
            request_id=str(index),
            prompt_token_ids=self._streams.prompt(index),
            resumed_token_ids=_NO_TOKENS,
            sampling=_GREEDY,
            stopping=StoppingParams(max_new_tokens=int(trace.output_tokens[index]), ignore_eos=True),
            adapter_digest=digest,
            fairness_key=f"tenant-{trace.tenant[index]}",
            arrived_s=float(trace.arrival_s[index]),
        )

    def tokens(self, requests: NDArray[np.int32], first: NDArray[np.int32], count: int) -> NDArray[np.int32]:
        """Return ``count`` tokens of each request from position ``first`` of its sequence on, int32 ``[n, count]``."""
        return self._streams.tokens(requests.astype(np.intp), first, count)

    def take(self, events: Iterable[SessionEvent], now_s: float) -> None:
        """Record which requests have ended."""
        for event in events:
            if isinstance(event, Ended):
                self._end(event, now_s)

    def _end(self, event: Ended, now_s: float) -> None:
        index, outcomes = event.session_slot, self._outcomes
        outcomes.end_s[index] = now_s
        outcomes.load_s[index] = event.adapter_load_s
        if event.finish_reason is FinishReason.LENGTH:
            outcomes.end[index] = End.DONE
            # Back from the end, not on from the arrival: the sum of its parts may round to later than the end.
            outcomes.first_token_s[index] = now_s - event.decode_s
            return
        outcomes.end[index] = End.ABORTED if event.queue_s > 0 else End.REFUSED
        if event.decode_s > 0:  # decode_s counts from the first token, which remains valid after a later error
            outcomes.first_token_s[index] = now_s - event.decode_s
