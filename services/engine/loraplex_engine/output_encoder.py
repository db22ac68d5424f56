"""Turns what steps did for one session into the session's messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex.v1 import engine_pb2

from loraplex_engine import convert
from loraplex_engine.messages import (
    Ended,
    Loading,
    PromptLogprobs,
    SessionEvent,
    Started,
    StepOutputs,
    TokenWithLogprobs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_engine.step import TokenLogprobs

MAX_MESSAGE_BYTES: Final = 1024 * 1024
"""Outputs larger than this are split over several messages (design.md section 5)."""


class OutputEncoder:
    """Encoder of one session.

    The only state is about requests that asked for their prompt's probabilities: these are computed chunk by chunk after
    the start, but travel in `EngineStarted`, so the start is held back until the first token or the end.
    """

    def __init__(self) -> None:
        self._wants_prompt_logprobs: set[int] = set()
        self._held: dict[int, tuple[Started, list[TokenLogprobs]]] = {}

    def expect_prompt_logprobs(self, session_slot: int) -> None:
        """Hold the slot's next start back until its prompt's probabilities are complete."""
        self._wants_prompt_logprobs.add(session_slot)

    def encode(self, step: StepOutputs) -> Iterator[engine_pb2.SessionResponse]:
        """Encode a step in as many messages as `MAX_MESSAGE_BYTES` asks for; at least one."""
        message = engine_pb2.SessionResponse(step=step.step_id)
        message.token_slots.extend(step.token_slots.tolist())
        message.token_sequences.extend(step.token_positions.tolist())
        message.token_ids.extend(step.token_ids.tolist())
        num_bytes = 0
        for output in self._outputs(step):
            size = output.ByteSize()
            if num_bytes and num_bytes + size > MAX_MESSAGE_BYTES:
                yield message
                message, num_bytes = engine_pb2.SessionResponse(step=step.step_id), 0
            message.outputs.append(output)
            num_bytes += size
        yield message

    def _outputs(self, step: StepOutputs) -> Iterator[engine_pb2.Output]:
        if self._held:
            with_tokens = set(step.token_slots.tolist())
            for slot in [slot for slot in self._held if slot in with_tokens]:
                yield from self._release(slot)
        for event in step.events:
            yield from self._encode(event)

    def _encode(self, event: SessionEvent) -> Iterator[engine_pb2.Output]:
        match event:
            case Started():
                if event.session_slot in self._wants_prompt_logprobs:
                    self._held[event.session_slot] = (event, [])
                else:
                    yield convert.started(event, [])
            case PromptLogprobs():
                self._held[event.session_slot][1].extend(event.entries)
            case Loading():
                yield convert.loading(event)
            case TokenWithLogprobs():
                yield from self._release(event.session_slot)
                yield convert.token(event)
            case Ended():
                yield from self._release(event.session_slot)
                self._wants_prompt_logprobs.discard(event.session_slot)
                yield convert.ended(event)

    def _release(self, slot: int) -> Iterator[engine_pb2.Output]:
        if slot in self._held:
            yield convert.started(*self._held.pop(slot))
