"""What an engine is sent of a request: all of it, its output so far, and the time that is left."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_gateway.engines.wire import Submission

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.requests.prepared import PreparedRequest


def submission_of(
    prepared: PreparedRequest,
    tokens: Sequence[int],
    *,
    max_model_len: int,
    has_started: bool,
    time_limit_at: float | None,
    now: float,
) -> Submission:
    """Return what to send.

    Args:
        prepared: The request.
        tokens: Its output so far.
        max_model_len: Longest sequence of the engine, in tokens.
        has_started: Whether an engine has run it before.
        time_limit_at: When the output is cut, monotonic seconds; None for never.
        now: Monotonic seconds.
    """
    request = prepared.request

    def left_s(instant: float | None) -> float | None:
        return None if instant is None else max(instant - now, 0.001)

    return Submission(
        request_id=request.request_id,
        prompt_ids=prepared.prompt_ids,
        resumed_ids=tuple(tokens),
        sampling=prepared.sampling,
        stopping=replace(prepared.stopping, max_new_tokens=prepared.most_new_tokens(max_model_len)),
        adapter_digests=prepared.adapter_digests,
        adapter_weights=prepared.adapter_weights,
        adapter_start=prepared.adapter_start,
        time_left_s=left_s(prepared.deadline),
        queue_timeout_s=None if has_started else left_s(prepared.queue_deadline),
        time_limit_s=left_s(time_limit_at),
        fairness_key=prepared.fairness_key,
        priority=prepared.priority,
        cache_salt=prepared.cache_salt,
        traceparent=request.traceparent,
        fail_fast=request.fail_fast and not has_started,
        logprobs=request.options.logprobs,
        prompt_logprobs=None if has_started else request.options.prompt_logprobs,
        structured_output=request.structured_output,
        bad_token_sequences=prepared.bad_token_sequences,
    )
