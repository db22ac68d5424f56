"""Turns wire messages of the gateway into `events` and `resources`; shared by both clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex.v1 import adapter_pb2, gateway_pb2
from loraplex_common.errors import StreamInterruptedError

from loraplex_client import events
from loraplex_client.resources import Model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.duration_pb2 import Duration

FINISH_REASONS: Final = {
    gateway_pb2.FINISH_REASON_STOP: events.FinishReason.STOP,
    gateway_pb2.FINISH_REASON_LENGTH: events.FinishReason.LENGTH,
    gateway_pb2.FINISH_REASON_TIME_LIMIT: events.FinishReason.TIME_LIMIT,
    gateway_pb2.FINISH_REASON_CANCELLED: events.FinishReason.CANCELLED,
}
TIERS: Final = {
    adapter_pb2.TIER_DEVICE: events.Tier.DEVICE,
    adapter_pb2.TIER_ARENA: events.Tier.ARENA,
    adapter_pb2.TIER_STORE: events.Tier.STORE,
    adapter_pb2.TIER_CANONICAL: events.Tier.CANONICAL,
    adapter_pb2.TIER_ORIGIN: events.Tier.ORIGIN,
}


class UnknownFinishError(StreamInterruptedError):
    """The gateway ended a stream for a reason that this version does not know."""


def seconds(duration: Duration) -> float:
    """Return a protobuf Duration in seconds."""
    return duration.ToNanoseconds() / 1e9


def event(response: gateway_pb2.GenerateResponse) -> events.Event | None:
    """Return the event of a stream's message; None for a kind that this version does not know."""
    match response.WhichOneof("event"):
        case "chunk":
            return _chunk(response.chunk)
        case "started":
            return _started(response.started)
        case "finished":
            return _finished(response.finished)
        case "accepted":
            return events.Accepted(request_id=response.accepted.request_id)
        case "queued":
            queued = response.queued
            return events.Queued(position=queued.position, estimated_wait_s=seconds(queued.estimated_wait))
        case "adapter_loading":
            loading = response.adapter_loading
            return events.AdapterLoading(
                bytes_done=loading.bytes_done, bytes_total=loading.bytes_total, tier=TIERS.get(loading.tier)
            )
        case _:
            return None


def completion(response: gateway_pb2.GenerateOnceResponse) -> events.Completion:
    """Return the result of a GenerateOnce."""
    return events.Completion(
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=_logprobs(response.logprobs),
        started=_started(response.started),
        finished=_finished(response.finished),
    )


def model(card: gateway_pb2.ModelCard) -> Model:
    """Return a model as the gateway lists it."""
    return Model(
        name=card.name,
        base_model=card.base_model,
        revision=card.revision,
        aliases={alias.label: alias.revision for alias in card.aliases},
        max_model_len=card.max_model_len,
        num_engines_resident=card.num_engines_resident,
    )


def _chunk(chunk: gateway_pb2.Chunk) -> events.Chunk:
    return events.Chunk(
        text=chunk.text,
        token_ids=tuple(chunk.token_ids),
        sequence=chunk.sequence,
        index=chunk.index,
        logprobs=_logprobs(chunk.logprobs),
    )


def _started(started: gateway_pb2.Started) -> events.Started:
    return events.Started(
        prompt_tokens=started.prompt_tokens,
        cached_tokens=started.cached_tokens,
        engine_id=started.engine_id,
        adapter_revision=started.adapter_revision,
        adapter_revisions=tuple(started.adapter_revisions),
        adapter_sources=tuple(started.adapter_sources),
        resume_token=started.resume_token,
        seed=started.seed,
        numerics=started.numerics,
        prompt_logprobs=_logprobs(started.prompt_logprobs),
    )


def _finished(finished: gateway_pb2.Finished) -> events.Finished:
    if finished.finish_reason not in FINISH_REASONS:
        raise UnknownFinishError(f"the gateway ended the stream for an unknown reason ({finished.finish_reason})")
    matched, usage, timings = finished.WhichOneof("matched_stop"), finished.usage, finished.timings
    return events.Finished(
        finish_reason=FINISH_REASONS[finished.finish_reason],
        stop_string=finished.stop_string if matched == "stop_string" else None,
        stop_token_id=finished.stop_token_id if matched == "stop_token_id" else None,
        usage=events.Usage(
            prompt_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens, cached_tokens=usage.cached_tokens
        ),
        timings=events.Timings(
            queue_s=seconds(timings.queue),
            adapter_load_s=seconds(timings.adapter_load),
            prefill_s=seconds(timings.prefill),
            decode_s=seconds(timings.decode),
        ),
    )


def _logprobs(positions: Iterable[gateway_pb2.PositionLogprobs]) -> tuple[events.PositionLogprobs, ...]:
    return tuple(
        events.PositionLogprobs(chosen=_token(position.chosen), top=tuple(_token(token) for token in position.top))
        for position in positions
    )


def _token(token: gateway_pb2.TokenLogprob) -> events.TokenLogprob:
    return events.TokenLogprob(token_id=token.token_id, logprob=token.logprob, text=token.text)
