"""Between the messages of `GatewayService` and our types."""

from __future__ import annotations

import json
from functools import singledispatch
from typing import TYPE_CHECKING, Any, Final

from loraplex.v1 import adapter_pb2, gateway_pb2
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind, StructuredOutput

from loraplex_gateway import types
from loraplex_gateway.engines.wire import from_duration, to_duration
from loraplex_gateway.text import template_variables, tool_rules
from loraplex_gateway.text.prompt_size import check_num_messages

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.message import Message

_PRIORITIES = {
    gateway_pb2.PRIORITY_UNSPECIFIED: None,
    **{priority.value: priority for priority in types.Priority},
}
_OUTPUT: Final = "structured_output"
_LOAD_POLICIES = (
    gateway_pb2.LOAD_POLICY_UNSPECIFIED,
    gateway_pb2.LOAD_POLICY_WAIT,
    gateway_pb2.LOAD_POLICY_FAIL_FAST,
)


def generation_request(
    message: gateway_pb2.GenerateRequest, *, is_stream: bool, traceparent: str = "", trace_id: str = ""
) -> types.GenerationRequest:
    """Convert a request.

    Raises:
        InvalidParameterError: For an enum value that this build does not know, or `resume` where there is no stream.
    """
    if message.HasField("resume") and not is_stream:
        raise InvalidParameterError("resume continues a stream: send it to Generate", field="resume")
    if message.priority not in _PRIORITIES:
        raise InvalidParameterError(f"priority {message.priority} is unknown", field="priority")
    if message.load_policy not in _LOAD_POLICIES:
        raise InvalidParameterError(f"load_policy {message.load_policy} is unknown", field="load_policy")
    return types.GenerationRequest(
        prompt=prompt(message),
        request_id=message.request_id,
        model=message.model,
        adapter=message.adapter,
        adapters=weighted_adapters(message.adapters),
        sampling=_sampling(message.sampling),
        stopping=_stopping(message.stopping),
        options=_options(message.response_options),
        priority=_PRIORITIES[message.priority],
        queue_timeout_s=from_duration(message.queue_timeout) if message.HasField("queue_timeout") else None,
        time_limit_s=from_duration(message.time_limit) if message.HasField("time_limit") else None,
        cache_salt=message.cache_salt,
        affinity_key=message.affinity_key,
        fail_fast=message.load_policy == gateway_pb2.LOAD_POLICY_FAIL_FAST,
        progress_events=message.progress_events,
        adapter_scale=_optional(message, "adapter_scale"),
        traceparent=traceparent,
        trace_id=trace_id,
        is_resumable=is_stream,
        resume=_resume(message.resume) if message.HasField("resume") else None,
        structured_output=_structured_output(message.structured_output) if message.HasField(_OUTPUT) else None,
        truncate_prompt_tokens=_optional(message, "truncate_prompt_tokens"),
    )


def weighted_adapters(messages: Iterable[gateway_pb2.WeightedAdapter]) -> tuple[types.WeightedAdapter, ...]:
    """Convert the adapters that a request adds up."""
    return tuple(types.WeightedAdapter(name=each.name, weight=_optional(each, "weight")) for each in messages)


def prompt(
    message: gateway_pb2.GenerateRequest | gateway_pb2.TokenizeRequest | gateway_pb2.CountTokensRequest,
    *,
    add_special_tokens: bool = True,
) -> types.Prompt | None:
    """Convert whichever prompt is set; None if none is."""
    which = message.WhichOneof("prompt")
    if which == "text":
        return types.TextPrompt(text=message.text, add_special_tokens=add_special_tokens)
    if which == "messages":
        return _chat(message.messages)
    if which == "token_ids" and isinstance(message, gateway_pb2.GenerateRequest):
        return types.TokenPrompt(ids=tuple(message.token_ids.ids))
    return None


def _chat(chat: gateway_pb2.ChatMessages) -> types.ChatPrompt:
    check_num_messages(len(chat.messages))
    return types.ChatPrompt(
        messages=tuple(_turn(turn) for turn in chat.messages),
        add_generation_prompt=_optional(chat, "add_generation_prompt", default=True),
        continue_final_message=_optional(chat, "continue_final_message", default=False),
        template_kwargs=template_variables.from_json(chat.chat_template_kwargs),
        tools=tool_rules.from_json(chat.tools),
    )


def _turn(turn: gateway_pb2.ChatMessage) -> types.ChatMessage:
    calls = (types.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in turn.tool_calls)
    return types.ChatMessage(
        role=turn.role,
        content=turn.content,
        name=_optional(turn, "name"),
        tool_calls=tuple(calls),
        tool_call_id=_optional(turn, "tool_call_id"),
        reasoning=_optional(turn, "reasoning"),
    )


def _optional(message: Message, field: str, *, default: Any = None) -> Any:
    return getattr(message, field) if message.HasField(field) else default


def _resume(message: gateway_pb2.Resume) -> types.Resume:
    return types.Resume(
        token=message.resume_token,
        last_sequence=message.last_sequence,
        token_ids=tuple(message.token_ids),
        num_text_bytes=_optional(message, "num_text_bytes"),
    )


def _sampling(message: gateway_pb2.SamplingParams) -> types.Sampling:
    names = (
        *("temperature", "top_k", "top_p", "min_p", "seed"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    )
    return types.Sampling(
        **{name: _optional(message, name) for name in names},
        logit_bias=dict(message.logit_bias),
        allowed_token_ids=tuple(message.allowed_token_ids),
        bad_words=tuple(message.bad_words),
    )


def _structured_output(message: gateway_pb2.StructuredOutput) -> StructuredOutput:
    which = message.WhichOneof("constraint")
    if which is None:
        raise InvalidParameterError(f"{_OUTPUT} has no constraint; set one, or leave it out", field=_OUTPUT)
    kind, value = ConstraintKind(which), getattr(message, which)
    if kind is ConstraintKind.JSON_OBJECT and not value:
        raise InvalidParameterError(f"{_OUTPUT}.json_object must be true; leave it out", field=f"{_OUTPUT}.json_object")
    texts = {ConstraintKind.JSON_OBJECT: "", ConstraintKind.CHOICE: ""}
    if kind is ConstraintKind.CHOICE:
        texts[kind] = json.dumps(list(value.choices))
    return StructuredOutput(kind=kind, text=texts.get(kind, value), starts_after=tuple(message.starts_after))


def _stopping(message: gateway_pb2.StoppingParams) -> types.Stopping:
    return types.Stopping(
        max_new_tokens=_optional(message, "max_new_tokens"),
        min_new_tokens=_optional(message, "min_new_tokens"),
        stop_strings=tuple(message.stop_strings),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
    )


def _options(message: gateway_pb2.ResponseOptions) -> types.ResponseOptions:
    return types.ResponseOptions(
        text=_optional(message, "text", default=True),
        token_ids=_optional(message, "token_ids", default=True),
        logprobs=_optional(message, "logprobs"),
        prompt_logprobs=_optional(message, "prompt_logprobs"),
        skip_special_tokens=_optional(message, "skip_special_tokens", default=True),
    )


def _token(token: types.TokenLogprob) -> gateway_pb2.TokenLogprob:
    return gateway_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob, text=token.text)


def positions(logprobs: Iterable[types.PositionLogprobs]) -> list[gateway_pb2.PositionLogprobs]:
    """Convert log-probabilities."""
    return [
        gateway_pb2.PositionLogprobs(chosen=_token(entry.chosen), top=[_token(top) for top in entry.top])
        for entry in logprobs
    ]


@singledispatch
def response(event: Any) -> gateway_pb2.GenerateResponse:
    """Convert an event into a message of the stream."""
    raise TypeError(f"no event: {event!r}")


@response.register
def _(event: types.Accepted) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(accepted=gateway_pb2.Accepted(request_id=event.request_id))


@response.register
def _(event: types.Queued) -> gateway_pb2.GenerateResponse:
    queued = gateway_pb2.Queued(position=event.position, estimated_wait=to_duration(event.estimated_wait_s))
    return gateway_pb2.GenerateResponse(queued=queued)


@response.register
def _(event: types.AdapterLoading) -> gateway_pb2.GenerateResponse:
    tier = adapter_pb2.Tier.ValueType(event.tier)
    loading = gateway_pb2.AdapterLoading(bytes_done=event.bytes_done, bytes_total=event.bytes_total, tier=tier)
    return gateway_pb2.GenerateResponse(adapter_loading=loading)


@response.register
def _(event: types.Started) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(started=started(event))


@response.register
def chunk_response(event: types.Chunk) -> gateway_pb2.GenerateResponse:
    """Convert a chunk."""
    chunk = gateway_pb2.Chunk(sequence=event.sequence, index=event.index, token_ids=event.token_ids, text=event.text)
    if event.logprobs:
        chunk.logprobs.extend(positions(event.logprobs))
    return gateway_pb2.GenerateResponse(chunk=chunk)


@response.register
def _(event: types.Finished) -> gateway_pb2.GenerateResponse:
    return gateway_pb2.GenerateResponse(finished=finished(event))


def started(event: types.Started) -> gateway_pb2.Started:
    """Convert the start."""
    return gateway_pb2.Started(
        prompt_tokens=event.prompt_tokens,
        cached_tokens=event.cached_tokens,
        engine_id=event.engine_id,
        adapter_revision=event.adapter_revision,
        adapter_revisions=event.adapter_revisions,
        adapter_sources=event.adapter_sources,
        resume_token=event.resume_token,
        seed=event.seed,
        numerics=event.numerics,
        prompt_logprobs=positions(event.prompt_logprobs),
    )


def finished(event: types.Finished) -> gateway_pb2.Finished:
    """Convert the end."""
    usage, timings = event.usage, event.timings
    message = gateway_pb2.Finished(
        finish_reason=gateway_pb2.FinishReason.ValueType(event.finish_reason),
        usage=gateway_pb2.Usage(
            prompt_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens, cached_tokens=usage.cached_tokens
        ),
        timings=gateway_pb2.Timings(
            queue=to_duration(timings.queue_s),
            adapter_load=to_duration(timings.adapter_load_s),
            prefill=to_duration(timings.prefill_s),
            decode=to_duration(timings.decode_s),
        ),
    )
    if event.stop_string is not None:
        message.stop_string = event.stop_string
    elif event.stop_token_id is not None:
        message.stop_token_id = event.stop_token_id
    return message


def model_card(card: types.ModelCard) -> gateway_pb2.ModelCard:
    """Convert the description of a model."""
    return gateway_pb2.ModelCard(
        name=card.name,
        base_model=card.base_model,
        revision=card.revision,
        aliases=[
            adapter_pb2.Alias(name=card.name, label=label, revision=revision)
            for label, revision in sorted(card.labels.items())
        ],
        max_model_len=card.max_model_len,
        num_engines_resident=card.num_engines_resident,
    )
