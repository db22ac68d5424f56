"""From the core's events to a Response, or to the stream of events that tells how it comes about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from loraplex_gateway.openai.errors import error_object, error_response
from loraplex_gateway.openai.logprobs import chat_logprob
from loraplex_gateway.openai.output_parts import OutputParts, Part, PartBegins, PartGrows, PartKind, consume
from loraplex_gateway.openai.responses_api.resource import COMPLETED, IN_PROGRESS, INCOMPLETE, Ending, Resource
from loraplex_gateway.types import Chunk, Finished, Started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.errors import LoraplexError
    from starlette.responses import Response

    from loraplex_gateway.openai.output_parts import PartEnds, Step
    from loraplex_gateway.openai.responses_api.convert import Asked
    from loraplex_gateway.types import Event, PositionLogprobs

Json = dict[str, Any]
# Open Responses ends every stream so; OpenAI's clients stop there as well.
DONE: Final = b"data: [DONE]\n\n"
ID_PREFIXES: Final = {PartKind.TEXT: "msg", PartKind.REASONING: "rs", PartKind.CALL: "fc"}
CONTENT_TYPES: Final = {PartKind.TEXT: "output_text", PartKind.REASONING: "reasoning_text"}
GROWS: Final = {
    PartKind.TEXT: "response.output_text.delta",
    PartKind.REASONING: "response.reasoning_text.delta",
    PartKind.CALL: "response.function_call_arguments.delta",
}
ENDS: Final = {
    PartKind.TEXT: "response.output_text.done",
    PartKind.REASONING: "response.reasoning_text.done",
    PartKind.CALL: "response.function_call_arguments.done",
}
# A cancelled response has no event of its own; its status says what it is.
LAST: Final = {COMPLETED: "response.completed"}


class ResponsesAnswer:
    """Writes one Response; see `answer.Answer`.

    Args:
        asked: What was asked for.
    """

    def __init__(self, asked: Asked) -> None:
        self._is_stream = asked.plan.is_stream
        self._request_id = asked.plan.requests[0].request_id
        self._num_top = asked.plan.logprobs
        self._names = asked.plan.names
        self._resource = Resource(asked, self._request_id)
        self._output = OutputParts()
        self._items: list[Json] = []
        self._delta_head = self._delta_tail = b""
        self._sequence = 0

    @property
    def is_stream(self) -> bool:
        """Whether events are sent as they come."""
        return self._is_stream

    @property
    def num_choices(self) -> int:
        """There is one output."""
        return 1

    def frame(self, choice: int, event: Event) -> bytes:
        """Return the events that tell of an event of the core."""
        if isinstance(event, Chunk):
            if self._output.lengthens(event):
                return self._delta(event.text)
            return b"".join([self._told(step) for step in self._output.push(event)])
        if isinstance(event, Started):
            self._resource.started(event)
            self._output.start(event)
            empty = self._resource.object([])
            return self._frame("response.created", response=empty) + self._frame("response.in_progress", response=empty)
        return self._ended(event) if isinstance(event, Finished) else b""

    def end(self) -> bytes:
        """Return the end of the stream."""
        return DONE

    def whole(self, events: Sequence[Sequence[Event]]) -> bytes:
        """Return the Response."""
        ending = Ending()
        for event in events[0]:
            if isinstance(event, Chunk):
                consume(self._output.push(event))
            elif isinstance(event, Started):
                self._resource.started(event)
                self._output.start(event)
            elif isinstance(event, Finished):
                consume(self._output.finish())
                ending = Ending(finished=event, num_reasoning_tokens=self._output.num_reasoning_tokens)
        parts = self._output.parts
        items = [self._item(part, self._status_of(part, ending)) for part in parts]
        return msgspec.json.encode(self._resource.object(items, ending))

    def failure(self, error: LoraplexError) -> bytes:
        """Return the events of a stream that fails: the error, and the Response that it leaves."""
        told = error_object(error, self._names)["error"]
        first = self._frame("error", code=told["code"], message=told["message"], param=told["param"])
        failed = self._resource.object(self._items, Ending(failure=error))
        return first + self._frame("response.failed", response=failed) + DONE

    def refusal(self, error: LoraplexError) -> Response:
        """Return the response of a request that fails before anything was sent."""
        return error_response(error, self._names)

    def _ended(self, event: Finished) -> bytes:
        ending = Ending(finished=event, num_reasoning_tokens=self._output.num_reasoning_tokens)
        told = [self._told(step, ending) for step in self._output.finish()]
        kind = LAST.get(ending.status, "response.incomplete")
        told.append(self._frame(kind, response=self._resource.object(self._items, ending)))
        return b"".join(told)

    def _told(self, step: Step, ending: Ending | None = None) -> bytes:
        if isinstance(step, PartGrows):
            return self._delta(step.text, step.logprobs)
        return self._begun(step.part) if isinstance(step, PartBegins) else self._whole_part(step, ending)

    def _begun(self, part: Part) -> bytes:
        place: Json = {"item_id": self._id(part), "output_index": part.index}
        item = {**self._item(part, IN_PROGRESS), **({} if part.kind is PartKind.CALL else {"content": []})}
        told = self._frame("response.output_item.added", output_index=part.index, item=item)
        if part.kind is not PartKind.CALL:
            place["content_index"] = 0
            told += self._frame("response.content_part.added", **place, part=self._content(part))
        self._prepare_deltas(part, place)
        return told

    def _prepare_deltas(self, part: Part, place: Json) -> None:
        """Write what all deltas of a part have in common once: an event is then two slices and its own text."""
        kind = GROWS[part.kind]
        common = msgspec.json.encode({"type": kind, **place})[:-1]
        self._delta_head = b"event: " + kind.encode() + b"\ndata: " + common + b',"delta":'
        self._delta_tail = b',"logprobs":[]' if part.kind is PartKind.TEXT else b""

    def _delta(self, text: str, logprobs: Sequence[PositionLogprobs] = ()) -> bytes:
        tail = self._delta_tail
        if logprobs and self._num_top is not None:
            tail = b',"logprobs":' + msgspec.json.encode(self._logprobs(logprobs))
        sequence = self._next_sequence()
        return b'%b%b%b,"sequence_number":%d}\n\n' % (self._delta_head, msgspec.json.encode(text), tail, sequence)

    def _whole_part(self, step: PartEnds, ending: Ending | None) -> bytes:
        part = step.part
        place: Json = {"item_id": self._id(part), "output_index": part.index}
        item = self._item(part, self._status_of(part, ending))
        if part.kind is PartKind.CALL:
            told = self._frame(ENDS[part.kind], **place, name=part.name, arguments=part.text)
        else:
            place["content_index"] = 0
            content = self._content(part)
            logprobs = {"logprobs": content["logprobs"]} if part.kind is PartKind.TEXT else {}
            told = self._frame(ENDS[part.kind], **place, text=part.text, **logprobs)
            told += self._frame("response.content_part.done", **place, part=content)
        self._items.append(item)
        return told + self._frame("response.output_item.done", output_index=part.index, item=item)

    def _status_of(self, part: Part, ending: Ending | None) -> str:
        """Return the status of a part that has ended: cut with the output if it is the last."""
        is_cut = ending is not None and ending.status != COMPLETED and part is self._output.parts[-1]
        return INCOMPLETE if is_cut else COMPLETED

    def _item(self, part: Part, status: str) -> Json:
        item: Json = {"id": self._id(part), "status": status}
        if part.kind is PartKind.CALL:
            return {**item, "type": "function_call", "call_id": part.call_id, "name": part.name, "arguments": part.text}
        content = [self._content(part)]
        if part.kind is PartKind.REASONING:
            return {**item, "type": "reasoning", "summary": [], "content": content}
        return {**item, "type": "message", "role": "assistant", "content": content}

    def _content(self, part: Part) -> Json:
        content: Json = {"type": CONTENT_TYPES[part.kind], "text": part.text}
        if part.kind is PartKind.TEXT:
            content |= {"annotations": [], "logprobs": self._logprobs(part.logprobs)}
        return content

    def _logprobs(self, entries: Sequence[PositionLogprobs]) -> list[Json]:
        num_top = self._num_top
        return [] if num_top is None else [chat_logprob(entry, num_top) for entry in entries]

    def _id(self, part: Part) -> str:
        return f"{ID_PREFIXES[part.kind]}_{self._request_id}-{part.index}"

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence - 1

    def _frame(self, kind: str, **members: Any) -> bytes:
        body = msgspec.json.encode({"type": kind, "sequence_number": self._next_sequence(), **members})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)
