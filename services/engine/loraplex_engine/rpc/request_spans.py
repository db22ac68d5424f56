"""The engine's spans of one session's requests, from submission to end; they cost nothing while tracing is off."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_common import trace_names as names
from loraplex_common import tracing

if TYPE_CHECKING:
    from loraplex_common.tracing import Span

    from loraplex_engine.messages import Ended, Submission

SESSION_LOST = "SESSION_LOST"


class RequestSpans:
    """Spans of open requests, by session slot."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Span, Submission]] = {}

    def begin(self, submission: Submission, traceparent: str) -> Submission:
        """Begin a request's span; returns the request, whose further spans are children of it."""
        span = tracing.start(names.ENGINE_REQUEST, parent=traceparent)
        if span is None:
            return replace(submission, traceparent=traceparent) if tracing.ids_of(traceparent)[0] else submission
        submission = replace(submission, traceparent=span.traceparent)
        self._open[submission.session_slot] = (span, submission)
        return submission

    def end(self, event: Ended) -> None:
        """End a request's span with what became of it."""
        if event.session_slot not in self._open:
            return
        span, submission = self._open.pop(event.session_slot)
        reason = event.error.reason if event.error is not None else None
        admitted_at = submission.arrived_s + event.queue_s
        if span.is_recording and event.prefill_s + event.decode_s > 0:
            span.event(names.STARTED, admitted_at)
            span.event(names.FIRST_TOKEN, admitted_at + event.prefill_s)
        span.end(
            {
                names.REQUEST_ID: submission.request_id,
                names.REVISION: ", ".join(term.digest for term in submission.adapters) or None,
                names.INPUT_TOKENS: len(submission.prompt_token_ids),
                names.NUM_RESUMED: len(submission.resumed_token_ids) or None,
                names.FINISH_REASONS: [event.finish_reason.value] if event.finish_reason is not None else None,
                names.QUEUE_S: event.queue_s,
                names.ADAPTER_LOAD_S: event.adapter_load_s,
                names.PREFILL_S: event.prefill_s,
                names.DECODE_S: event.decode_s,
                names.KV_PAGE_S: event.kv_page_s,
                names.ADAPTER_PAGE_S: event.adapter_page_s,
                names.ERROR_TYPE: reason,
            },
            error=reason,
        )

    def close(self) -> None:
        """End the spans of requests that the session has lost."""
        for span, submission in self._open.values():
            attributes = {names.REQUEST_ID: submission.request_id, names.ERROR_TYPE: SESSION_LOST}
            span.end(attributes, error=SESSION_LOST)
        self._open.clear()
