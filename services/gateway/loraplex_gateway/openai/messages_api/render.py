"""From the core's events to a Message, or to the stream of events that tells how it comes about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from loraplex_gateway.openai.answer import system_fingerprint
from loraplex_gateway.openai.messages_api import errors
from loraplex_gateway.openai.output_parts import OutputParts, Part, PartBegins, PartGrows, PartKind, consume
from loraplex_gateway.types import Chunk, Finished, FinishReason, Started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.errors import LoraplexError
    from starlette.responses import Response

    from loraplex_gateway.openai.convert import Plan
    from loraplex_gateway.openai.output_parts import Step
    from loraplex_gateway.types import Event

Json = dict[str, Any]
# Clients leave out thoughts without a signature when they send a conversation back; here nothing depends on it.
SIGNATURE: Final = "unsigned"
# What Anthropic's clients are told to make of arguments that are no JSON object, which a cut call may have.
INVALID_JSON: Final = "INVALID_JSON"
EMPTY_BLOCKS: Final[dict[PartKind, Json]] = {
    PartKind.TEXT: {"type": "text", "text": ""},
    PartKind.REASONING: {"type": "thinking", "thinking": "", "signature": ""},
}
DELTAS: Final = {
    PartKind.TEXT: ("text_delta", "text"),
    PartKind.REASONING: ("thinking_delta", "thinking"),
    PartKind.CALL: ("input_json_delta", "partial_json"),
}
# time_limit cuts as max_tokens does; "abort" is what vLLM calls a cancelled request.
STOP_REASONS: Final = {
    FinishReason.STOP: "end_turn",
    FinishReason.LENGTH: "max_tokens",
    FinishReason.TIME_LIMIT: "max_tokens",
    FinishReason.CANCELLED: "abort",
}


class MessagesAnswer:
    """Writes one Message; see `answer.Answer`.

    Args:
        plan: What was asked for.
        trace_id: The caller's id of the request, repeated in errors.
    """

    def __init__(self, plan: Plan, *, trace_id: str) -> None:
        self._plan = plan
        self._trace_id = trace_id
        self._output = OutputParts()
        self._revision: str | None = None
        self._delta_head = b""

    @property
    def is_stream(self) -> bool:
        """Whether events are sent as they come."""
        return self._plan.is_stream

    @property
    def num_choices(self) -> int:
        """There is one output."""
        return 1

    def frame(self, choice: int, event: Event) -> bytes:
        """Return the events that tell of an event of the core."""
        if isinstance(event, Chunk):
            if self._output.lengthens(event):
                return b"%b%b}}\n\n" % (self._delta_head, msgspec.json.encode(event.text))
            return b"".join([self._told(step) for step in self._output.push(event)])
        if isinstance(event, Started):
            self._start(event)
            usage = _usage(event.prompt_tokens, event.cached_tokens, 0)
            return _frame("message_start", message=self._message([], usage)) + _frame("ping")
        return self._ended(event) if isinstance(event, Finished) else b""

    def end(self) -> bytes:
        """Return nothing: message_stop was the end."""
        return b""

    def whole(self, events: Sequence[Sequence[Event]]) -> bytes:
        """Return the Message."""
        finished: Finished | None = None
        for event in events[0]:
            if isinstance(event, Chunk):
                consume(self._output.push(event))
            elif isinstance(event, Started):
                self._start(event)
            elif isinstance(event, Finished):
                finished = event
                consume(self._output.finish())
        assert finished is not None  # the core's last event
        message = self._message([_block(part) for part in self._output.parts], _usage_of(finished))
        return msgspec.json.encode({**message, **self._stop(finished)})

    def failure(self, error: LoraplexError) -> bytes:
        """Return the event of a stream that fails."""
        return b"event: error\ndata: %b\n\n" % errors.body_of(error, self._trace_id, self._plan.names)

    def refusal(self, error: LoraplexError) -> Response:
        """Return the response of a request that fails before anything was sent."""
        return errors.refusal(error, self._trace_id, self._plan.names)

    def _start(self, started: Started) -> None:
        self._revision = system_fingerprint(started)
        self._output.start(started)

    def _message(self, content: list[Json], usage: Json) -> Json:
        return {
            "id": f"msg_{self._plan.requests[0].request_id}",
            "type": "message",
            "role": "assistant",
            "model": self._plan.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
            # As in chat completions: the adapter's exact weights.
            "system_fingerprint": self._revision,
        }

    def _ended(self, finished: Finished) -> bytes:
        told = [self._told(step) for step in self._output.finish()]
        told.append(_frame("message_delta", delta=self._stop(finished), usage=_usage_of(finished)))
        return b"".join([*told, _frame("message_stop")])

    def _told(self, step: Step) -> bytes:
        if isinstance(step, PartGrows):
            return b"%b%b}}\n\n" % (self._delta_head, msgspec.json.encode(step.text))
        part = step.part
        if isinstance(step, PartBegins):
            self._prepare_deltas(part)
            return _frame("content_block_start", index=part.index, content_block=_empty_block(part))
        signed = b""
        if part.kind is PartKind.REASONING:
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            signed = _frame("content_block_delta", index=part.index, delta=delta)
        return signed + _frame("content_block_stop", index=part.index)

    def _prepare_deltas(self, part: Part) -> None:
        """Write what all deltas of a block have in common once: an event is then that and its own text."""
        kind, member = DELTAS[part.kind]
        self._delta_head = (
            b"event: content_block_delta\n"
            b'data: {"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":'
            % (part.index, kind.encode(), member.encode())
        )

    def _stop(self, finished: Finished) -> Json:
        reason = STOP_REASONS[finished.finish_reason]
        sequence = finished.stop_string if finished.finish_reason is FinishReason.STOP else None
        if sequence is not None:
            reason = "stop_sequence"
        elif self._output.has_calls and finished.finish_reason is FinishReason.STOP:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": sequence}


def _empty_block(part: Part) -> Json:
    if part.kind is PartKind.CALL:
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": {}}
    return EMPTY_BLOCKS[part.kind]


def _block(part: Part) -> Json:
    if part.kind is PartKind.CALL:
        return {**_empty_block(part), "input": _input(part.text)}
    member = DELTAS[part.kind][1]
    block = {**EMPTY_BLOCKS[part.kind], member: part.text}
    return {**block, "signature": SIGNATURE} if part.kind is PartKind.REASONING else block


def _input(arguments: str) -> Json:
    try:
        value = msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: arguments}


def _usage_of(finished: Finished) -> Json:
    usage = finished.usage
    return _usage(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens)


def _usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> Json:
    """Return the counts as Anthropic has them: the prompt's tokens are those that were cached and the others."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }


def _frame(kind: str, **members: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **members}))
