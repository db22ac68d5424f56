"""Converts between wire and domain; the servicer, sessions and the store client convert only their own messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypedDict

from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import adapter_pb2, engine_pb2, gateway_pb2
from loraplex_common.error_status import to_status
from loraplex_common.errors import DeadlineError, InvalidParameterError, NotSupportedError
from loraplex_common.request_limits import MAX_INT32
from loraplex_common.unknown_fields import refuse_unknown_fields

from loraplex_engine.messages import (
    Ended,
    FinishReason,
    Loading,
    Priority,
    ResidencyState,
    Started,
    Submission,
    TokenWithLogprobs,
)
from loraplex_engine.rpc.adapter_fields import check_adapter_start, check_more_adapters
from loraplex_engine.rpc.output_fields import check_bad_sequences, check_structured_output
from loraplex_engine.rpc.validation import (
    MAX_REQUEST_ID_BYTES,
    RequestLimits,
    added_token_ids,
    check_digest,
    check_drawable,
    check_range,
    check_sampling,
    check_stopping,
    check_tokens,
    require,
)

if TYPE_CHECKING:
    from loraplex_engine.loop.load_report import LoadSnapshot
    from loraplex_engine.step import TokenLogprobs

_PRIORITIES: Final = {
    gateway_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    gateway_pb2.PRIORITY_BATCH: Priority.BATCH,
    gateway_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    gateway_pb2.PRIORITY_HIGH: Priority.HIGH,
}
_FAIL_FAST: Final = {
    gateway_pb2.LOAD_POLICY_UNSPECIFIED: False,
    gateway_pb2.LOAD_POLICY_WAIT: False,
    gateway_pb2.LOAD_POLICY_FAIL_FAST: True,
}
_FINISH_REASONS: Final = {
    FinishReason.STOP: gateway_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: gateway_pb2.FINISH_REASON_LENGTH,
    FinishReason.TIME_LIMIT: gateway_pb2.FINISH_REASON_TIME_LIMIT,
    FinishReason.CANCELLED: gateway_pb2.FINISH_REASON_CANCELLED,
}
_TIERS: Final[dict[ResidencyState, adapter_pb2.Tier.ValueType]] = {
    # The engine does not know whether a store has the image in its memory or must still make it.
    ResidencyState.ABSENT: adapter_pb2.TIER_UNSPECIFIED,
    ResidencyState.WANTED: adapter_pb2.TIER_UNSPECIFIED,
    ResidencyState.IN_ARENA: adapter_pb2.TIER_ARENA,
    ResidencyState.LOADING: adapter_pb2.TIER_ARENA,
    ResidencyState.RESIDENT: adapter_pb2.TIER_DEVICE,
    ResidencyState.DRAINING: adapter_pb2.TIER_DEVICE,
}
_STATES: Final[dict[ResidencyState, engine_pb2.ResidentAdapter.State.ValueType]] = {
    ResidencyState.ABSENT: engine_pb2.ResidentAdapter.STATE_UNSPECIFIED,
    ResidencyState.WANTED: engine_pb2.ResidentAdapter.STATE_UNSPECIFIED,
    ResidencyState.IN_ARENA: engine_pb2.ResidentAdapter.STATE_IN_ARENA,
    ResidencyState.LOADING: engine_pb2.ResidentAdapter.STATE_LOADING,
    ResidencyState.RESIDENT: engine_pb2.ResidentAdapter.STATE_RESIDENT,
    ResidencyState.DRAINING: engine_pb2.ResidentAdapter.STATE_DRAINING,
}


def submission(submit: engine_pb2.Submit, *, session_id: int, limits: RequestLimits, now_s: float) -> Submission:
    """Check a request from the wire and return it as a `Submission`.

    Args:
        submit: The request.
        session_id: The session that the request came by.
        limits: Limits of the served model.
        now_s: ``time.monotonic()`` when it arrived; relative times count from here.

    Raises:
        NotSupportedError: If it has a field that this engine does not know: it would be answered without.
        InvalidParameterError: If a field is out of its range; `field` names it.
        DeadlineError: If the client's deadline has passed already.
    """
    _check_header(submit)
    prompt, resumed = check_tokens(submit, limits)
    sampling, stopping = check_sampling(submit, limits), check_stopping(submit, limits)
    check_drawable(sampling, stopping, limits)
    return Submission(
        session_id=session_id,
        session_slot=submit.slot,
        request_id=submit.request_id,
        prompt_token_ids=prompt,
        resumed_token_ids=resumed,
        sampling=sampling,
        stopping=stopping,
        adapter_digest=check_digest(submit.adapter_digest, "adapter_digest") if submit.adapter_digest else None,
        adapter_scale=check_range(_scale(submit), "adapter_scale"),
        more_adapters=check_more_adapters(submit),
        adapter_start=check_adapter_start(submit),
        **_moments(submit, now_s),
        fairness_key=submit.fairness_key,
        priority=_PRIORITIES[submit.priority],
        cache_salt=submit.cache_salt,
        fail_fast=_FAIL_FAST[submit.load_policy],
        arrived_s=now_s,
        added_token_ids=added_token_ids(submit, limits),
        structured_output=check_structured_output(submit, limits),
        bad_token_sequences=check_bad_sequences(submit, limits),
    )


def _scale(submit: engine_pb2.Submit) -> float:
    return submit.adapter_scale if submit.HasField("adapter_scale") else 1.0


class _Moments(TypedDict):
    """Fields of `Submission`."""

    deadline_s: float | None
    queue_deadline_s: float | None
    time_limit_at_s: float | None


def _moments(submit: engine_pb2.Submit, now_s: float) -> _Moments:
    return {
        "deadline_s": _deadline(submit, now_s),
        "queue_deadline_s": _moment(submit, "queue_timeout", now_s),
        "time_limit_at_s": _moment(submit, "time_limit", now_s),
    }


def _deadline(submit: engine_pb2.Submit, now_s: float) -> float | None:
    deadline_s = _moment(submit, "time_left", now_s)
    if deadline_s is not None and deadline_s <= now_s:
        raise DeadlineError("the client's deadline passed before the request reached the engine")
    return deadline_s


def _check_known(submit: engine_pb2.Submit) -> None:
    try:
        refuse_unknown_fields(submit)
    except InvalidParameterError as error:
        raise NotSupportedError(
            f"this engine is of an earlier version than its gateway: the request has field {error.field} of Submit, which it "
            "does not know; update the engine, or ask without what the gateway's version has brought"
        ) from error


def _check_header(submit: engine_pb2.Submit) -> None:
    """Check that all fields are known, and those that say which request it is and how urgent, not what it computes."""
    _check_known(submit)
    require(submit.slot <= MAX_INT32, "slot", f"{submit.slot} exceeds {MAX_INT32}")
    require(
        len(submit.request_id.encode()) <= MAX_REQUEST_ID_BYTES,
        "request_id",
        f"longer than {MAX_REQUEST_ID_BYTES} bytes",
    )
    require(submit.priority in _PRIORITIES, "priority", f"{submit.priority} is not a class of service")
    require(submit.load_policy in _FAIL_FAST, "load_policy", f"{submit.load_policy} is not a policy")


def _moment(submit: engine_pb2.Submit, field: str, now_s: float) -> float | None:
    if not submit.HasField(field):  # type: ignore[arg-type]
        return None
    value: Duration = getattr(submit, field)
    seconds = value.seconds + value.nanos * 1e-9
    require(field == "time_left" or seconds >= 0, field, f"{seconds:g} s is negative")
    return now_s + seconds


def duration(seconds: float) -> Duration:
    """Return a duration of that many seconds, rounded to microseconds."""
    wire = Duration()
    wire.FromMicroseconds(round(seconds * 1e6))
    return wire


def started(event: Started, prompt_logprobs: list[TokenLogprobs]) -> engine_pb2.Output:
    """Encode a start with the prompt's probabilities."""
    start = engine_pb2.EngineStarted(
        cached_tokens=event.cached_tokens,
        queue=duration(event.queue_s),
        adapter_load=duration(event.adapter_load_s),
        prompt_logprobs=[position_logprobs(entry) for entry in prompt_logprobs],
    )
    return engine_pb2.Output(slot=event.session_slot, started=start)


def loading(event: Loading) -> engine_pb2.Output:
    """Encode how far a request's adapter has come."""
    progress = gateway_pb2.AdapterLoading(
        bytes_done=event.bytes_done, bytes_total=event.bytes_total, tier=tier(event.state)
    )
    return engine_pb2.Output(slot=event.session_slot, loading=progress)


def token(event: TokenWithLogprobs) -> engine_pb2.Output:
    """Encode a token with its probabilities."""
    return engine_pb2.Output(
        slot=event.session_slot,
        sequence=event.position,
        token_ids=[event.token_id],
        logprobs=[position_logprobs(event.logprobs)],
    )


def ended(event: Ended) -> engine_pb2.Output:
    """Encode an end: a finish or a rich status."""
    usage = engine_pb2.EngineUsage(kv_page_seconds=event.kv_page_s, adapter_page_seconds=event.adapter_page_s)
    if event.error is not None:
        return engine_pb2.Output(slot=event.session_slot, error=to_status(event.error), usage=usage)
    if event.finish_reason is None:
        raise ValueError(f"slot {event.session_slot} ended with neither a reason nor an error")
    finish = engine_pb2.EngineFinish(
        finish_reason=_FINISH_REASONS[event.finish_reason],
        timings=gateway_pb2.Timings(
            queue=duration(event.queue_s),
            adapter_load=duration(event.adapter_load_s),
            prefill=duration(event.prefill_s),
            decode=duration(event.decode_s),
        ),
    )
    if event.stop_token_id is not None:
        finish.stop_token_id = event.stop_token_id
    return engine_pb2.Output(slot=event.session_slot, finish=finish, usage=usage)


def position_logprobs(entry: TokenLogprobs) -> gateway_pb2.PositionLogprobs:
    """Encode one position's probabilities; the gateway adds the texts."""
    tokens = [
        gateway_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
        for token_id, logprob in zip(entry.token_ids.tolist(), entry.logprobs.tolist(), strict=True)
    ]
    return gateway_pb2.PositionLogprobs(chosen=tokens[0], top=tokens[1:])


def load_report(load: LoadSnapshot) -> engine_pb2.LoadReport:
    """Encode the engine's load."""
    return engine_pb2.LoadReport(
        sequence=load.sequence,
        running=load.running,
        waiting=load.waiting,
        queued_uncached_tokens=load.queued_uncached_tokens,
        pages_total=load.pages_total,
        pages_free=load.pages_free,
        pages_kv=load.pages_kv,
        pages_adapter=load.pages_adapter,
        pages_pinned=load.pages_pinned,
        adapters_resident=load.adapters_resident,
        tokens_per_s=load.tokens_per_s,
        draining=load.draining,
    )


def tier(state: ResidencyState) -> adapter_pb2.Tier.ValueType:
    """Return where the engine's best copy of an adapter in that state is; unspecified if it has none."""
    return _TIERS[state]


def resident_state(state: ResidencyState) -> engine_pb2.ResidentAdapter.State.ValueType:
    """Return the wire's value for a state of residency."""
    return _STATES[state]
