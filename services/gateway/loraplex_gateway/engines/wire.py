"""Between our types and the messages of an engine session."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, TypeAlias

from google.protobuf import duration_pb2
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.error_status import from_status
from loraplex_common.numerics import spoken
from loraplex_common.structured_output import ConstraintKind, StructuredOutput

from loraplex_gateway.types import (
    AdapterLoading,
    FinishReason,
    PositionLogprobs,
    Priority,
    Sampling,
    Stopping,
    Timings,
    TokenLogprob,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from loraplex_common.errors import LoraplexError
    from loraplex_common.registry import EngineRecord


LogprobsMessage: TypeAlias = gateway_pb2.PositionLogprobs
"""Log-probabilities as an engine sent them. A ticket and an update hand them on unread: what they stand for is known once
the output knows where each token's text is, and `positions` converts them there, once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One tokenised request for an engine; durations count from now.

    Attributes:
        adapter_digests: The adapters to add up, in order; none for the base model.
        adapter_weights: A factor for each of them; None for 1.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    resumed_ids: tuple[int, ...] = ()
    sampling: Sampling
    stopping: Stopping
    adapter_digests: tuple[str, ...] = ()
    adapter_weights: tuple[float | None, ...] = ()
    adapter_start: int | None = None
    time_left_s: float | None = None
    queue_timeout_s: float | None = None
    time_limit_s: float | None = None
    fairness_key: str = ""
    priority: Priority
    cache_salt: str = ""
    traceparent: str = ""
    fail_fast: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_output: StructuredOutput | None = None
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStart:
    """The request is in a batch."""

    cached_tokens: int
    queue_s: float
    adapter_load_s: float
    prompt_logprobs: tuple[LogprobsMessage, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFinish:
    """A normal end."""

    reason: FinishReason
    stop_token_id: int | None
    timings: Timings


class WrongEngineError(Exception):
    """Another engine answers at the address of the one that is wanted."""


def check_welcome(welcome: engine_pb2.SessionResponse.Welcome, wanted: EngineRecord) -> None:
    """Refuse an engine that is not the one that the registry listed: its weights may be others.

    Raises:
        WrongEngineError: If it is not.
    """
    found = (welcome.engine_id, welcome.base_fingerprint, welcome.numerics)
    if found != (wanted.engine_id, wanted.base_fingerprint, wanted.numerics):
        raise WrongEngineError(
            f"engine {found[0] or '?'} of base {found[1][:12] or '?'} and numerics {spoken(found[2])} answers at {wanted.target}"
        )


def to_duration(seconds: float) -> duration_pb2.Duration:
    """Return a duration message; negative times become zero."""
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(max(0, round(seconds * 1e9)))
    return duration


def from_duration(duration: duration_pb2.Duration) -> float:
    """Return seconds."""
    return duration.seconds + duration.nanos / 1e9


def to_submit(submission: Submission, slot: int) -> engine_pb2.Submit:
    """Return the message that hands a request to an engine."""
    terms = [*zip(submission.adapter_digests, submission.adapter_weights, strict=True)]
    digest, scale = terms[0] if terms else ("", None)
    submit = engine_pb2.Submit(
        request_id=submission.request_id,
        slot=slot,
        prompt_token_ids=submission.prompt_ids,
        resumed_token_ids=submission.resumed_ids,
        sampling=_sampling(submission.sampling),
        stopping=_stopping(submission.stopping),
        adapter_digest=digest,
        adapter_scale=scale,
        more_adapters=[engine_pb2.AdapterTerm(digest=digest, scale=scale) for digest, scale in terms[1:]],
        adapter_start=submission.adapter_start,
        fairness_key=submission.fairness_key,
        priority=gateway_pb2.Priority.ValueType(submission.priority),
        cache_salt=submission.cache_salt,
        traceparent=submission.traceparent,
        load_policy=gateway_pb2.LOAD_POLICY_FAIL_FAST if submission.fail_fast else gateway_pb2.LOAD_POLICY_WAIT,
        logprobs=submission.logprobs,
        prompt_logprobs=submission.prompt_logprobs,
        bad_token_sequences=[gateway_pb2.TokenIds(ids=ids) for ids in submission.bad_token_sequences],
    )
    if submission.structured_output is not None:
        submit.structured_output.CopyFrom(_structured_output(submission.structured_output))
    for field in ("time_left", "queue_timeout", "time_limit"):
        seconds: float | None = getattr(submission, f"{field}_s")
        if seconds is not None:
            getattr(submit, field).CopyFrom(to_duration(seconds))
    return submit


def _structured_output(wanted: StructuredOutput) -> gateway_pb2.StructuredOutput:
    message = gateway_pb2.StructuredOutput(starts_after=wanted.starts_after)
    if wanted.kind is ConstraintKind.JSON_OBJECT:
        message.json_object = True
    elif wanted.kind is ConstraintKind.CHOICE:
        message.choice.choices.extend(json.loads(wanted.text))
    else:
        setattr(message, wanted.kind.value, wanted.text)
    return message


def _sampling(sampling: Sampling) -> gateway_pb2.SamplingParams:
    return gateway_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        allowed_token_ids=sampling.allowed_token_ids,
    )


def _stopping(stopping: Stopping) -> gateway_pb2.StoppingParams:
    """Stop strings stay here: the engine knows no text."""
    return gateway_pb2.StoppingParams(
        max_new_tokens=stopping.max_new_tokens,
        min_new_tokens=stopping.min_new_tokens,
        stop_token_ids=stopping.stop_token_ids,
        ignore_eos=stopping.ignore_eos,
    )


def positions(
    messages: Iterable[gateway_pb2.PositionLogprobs],
    token_bytes: Callable[[int], bytes],
    text_offsets: Iterable[int] = repeat(0),
) -> tuple[PositionLogprobs, ...]:
    """Return log-probabilities with the tokens' text and where it is, which the engine does not know."""

    def token(message: gateway_pb2.TokenLogprob) -> TokenLogprob:
        data = token_bytes(message.token_id)
        text = data.decode("utf-8", errors="replace")
        return TokenLogprob(token_id=message.token_id, logprob=message.logprob, text=text, data=data)

    return tuple(
        PositionLogprobs(
            chosen=token(message.chosen), top=tuple(token(top) for top in message.top), text_offset=text_offset
        )
        for message, text_offset in zip(messages, text_offsets, strict=False)
    )


def started(message: engine_pb2.EngineStarted) -> EngineStart:
    """Convert the start of a request."""
    return EngineStart(
        cached_tokens=message.cached_tokens,
        queue_s=from_duration(message.queue),
        adapter_load_s=from_duration(message.adapter_load),
        prompt_logprobs=tuple(message.prompt_logprobs),
    )


def loading(message: gateway_pb2.AdapterLoading) -> AdapterLoading:
    """Convert the progress of an adapter's load."""
    return AdapterLoading(bytes_done=message.bytes_done, bytes_total=message.bytes_total, tier=message.tier)


def end(output: engine_pb2.Output) -> EngineFinish | LoraplexError | None:
    """Convert the end of a request, if the output has one."""
    which = output.WhichOneof("end")
    if which is None:
        return None
    if which == "error":
        return from_status(output.error)
    finish, timings = output.finish, output.finish.timings
    return EngineFinish(
        reason=FinishReason(finish.finish_reason),
        stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
        timings=Timings(
            queue_s=from_duration(timings.queue),
            adapter_load_s=from_duration(timings.adapter_load),
            prefill_s=from_duration(timings.prefill),
            decode_s=from_duration(timings.decode),
        ),
    )


def used(output: engine_pb2.Output) -> tuple[float, float] | None:
    """Return page-seconds of a request's sequence and of its adapters; None if its engine does not say."""
    if not output.HasField("usage"):
        return None
    return output.usage.kv_page_seconds, output.usage.adapter_page_seconds
