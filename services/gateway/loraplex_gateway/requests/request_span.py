"""The gateway's span of a request: from its arrival to its end, with what the engines made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common import trace_names as names
from loraplex_common import tracing

from loraplex_gateway.prompts import ChatPrompt

if TYPE_CHECKING:
    from loraplex_common.tracing import Span
    from loraplex_common.usage_records import UsageRecord

    from loraplex_gateway.requests.times import RequestTimes
    from loraplex_gateway.types import Finished, GenerationRequest


def begin_span(request: GenerationRequest) -> Span | None:
    """Begin a request's span; None while tracing is off. Elsewhere the request is its child: see `Span.traceparent`."""
    operation = names.OPERATION_CHAT if isinstance(request.prompt, ChatPrompt) else names.OPERATION_COMPLETION
    name = " ".join(filter(None, (operation, request.model or request.adapter)))
    return tracing.start(name, parent=request.traceparent)


def end_span(
    span: Span, request: GenerationRequest, record: UsageRecord, times: RequestTimes, end: Finished | None
) -> None:
    """End a request's span with what its record says."""
    first_at = times.first_token_at
    moments = ((names.QUEUED, times.queued_at), (names.ADMITTED, times.admitted_at))
    if span.is_recording:
        for name, at in (*moments, (names.STARTED, times.started_at), (names.FIRST_TOKEN, first_at)):
            if at is not None:
                span.event(name, at)
    is_chat = isinstance(request.prompt, ChatPrompt)
    span.end(
        {
            names.OPERATION: names.OPERATION_CHAT if is_chat else names.OPERATION_COMPLETION,
            names.PROVIDER: names.PROVIDER_NAME,
            names.REQUEST_MODEL: request.model or request.adapter or record.model or None,
            names.RESPONSE_MODEL: record.model or None,
            names.RESPONSE_ID: record.request_id,
            names.REQUEST_ID: record.request_id,
            names.MAX_TOKENS: request.stopping.max_new_tokens,
            names.FINISH_REASONS: [end.finish_reason.name.lower()] if end is not None else None,
            names.INPUT_TOKENS: record.input_tokens,
            names.CACHED_TOKENS: record.cached_tokens,
            names.OUTPUT_TOKENS: record.output_tokens,
            names.TIME_TO_FIRST_TOKEN: first_at - times.arrived_at if first_at is not None else None,
            names.TENANT: record.tenant,
            names.ADAPTER: record.adapter or None,
            names.REVISION: record.revision or None,
            names.USAGE_ID: record.usage_id or None,
            names.QUEUE_S: record.queue_s,
            names.ATTEMPTS: record.attempts,
            names.ERROR_TYPE: record.reason if record.code != "OK" else None,
        },
        error=record.reason if record.code != "OK" else None,
    )
