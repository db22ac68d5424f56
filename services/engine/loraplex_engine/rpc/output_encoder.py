"""Turns the outputs of steps for one session into the session's messages."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex.v1 import engine_pb2

from loraplex_engine.faults import internal_error
from loraplex_engine.messages import (
    Ended,
    Loading,
    PromptLogprobs,
    SessionEvent,
    Started,
    StepOutputs,
    TokenWithLogprobs,
)
from loraplex_engine.rpc import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loraplex_common.errors import LoraplexError

    from loraplex_engine.step import TokenLogprobs

MAX_MESSAGE_BYTES: Final = 1024 * 1024
"""Outputs larger than this are split over several messages."""

_BEFORE_TOKENS: Final = (Started, Loading, PromptLogprobs)


class OutputEncoder:
    """Encodes one session's outputs.

    It keeps state for two kinds of requests. The first kind asked for the probabilities of its prompt. These are
    computed chunk by chunk after the start but travel in `EngineStarted`, so the start is held back until the first
    token or the end. The second kind could not be encoded. After that, only such a request's end is sent, with the
    error, and only once the engine has released the request: the gateway may use a slot again as soon as it reads an
    end.

    Args:
        abort: Called with the slot of a request that could not be encoded; ends the request in the engine.
    """

    def __init__(self, abort: Callable[[int], None]) -> None:
        self._abort = abort
        self._wants_prompt_logprobs: set[int] = set()
        self._held: dict[int, tuple[Started, list[TokenLogprobs]]] = {}
        self._failed: dict[int, LoraplexError] = {}

    def expect_prompt_logprobs(self, session_slot: int) -> None:
        """Hold the slot's next start back until its prompt's probabilities are complete."""
        self._wants_prompt_logprobs.add(session_slot)

    def encode(self, step: StepOutputs) -> Iterator[engine_pb2.SessionResponse]:
        """Encode a step, in as many messages as `MAX_MESSAGE_BYTES` requires; at least one.

        A request's start is never in a later message than its tokens, its end never in an earlier one: a reader takes a
        message's plain tokens first, then its outputs.
        """
        message, num_bytes = engine_pb2.SessionResponse(step=step.step_id), 0
        for output in self._outputs(step):
            if output is None:
                self._add_tokens(message, step)
                continue
            size = output.ByteSize()
            if num_bytes and num_bytes + size > MAX_MESSAGE_BYTES:
                yield message
                message, num_bytes = engine_pb2.SessionResponse(step=step.step_id), 0
            message.outputs.append(output)
            num_bytes += size
        yield message

    def _add_tokens(self, message: engine_pb2.SessionResponse, step: StepOutputs) -> None:
        slots, positions, ids = step.token_slots, step.token_positions, step.token_ids
        if self._failed:
            is_sound = ~np.isin(slots, list(self._failed))
            slots, positions, ids = slots[is_sound], positions[is_sound], ids[is_sound]
        message.token_slots.extend(slots.tolist())
        message.token_sequences.extend(positions.tolist())
        message.token_ids.extend(ids.tolist())

    def _outputs(self, step: StepOutputs) -> Iterator[engine_pb2.Output | None]:
        """Yield the outputs that precede the plain tokens, then None for these, then the outputs that follow."""
        for event in step.events:
            if isinstance(event, _BEFORE_TOKENS):
                yield from self._encode(event)
        if self._held:
            with_tokens = set(step.token_slots.tolist())
            for slot in [slot for slot in self._held if slot in with_tokens]:
                yield from self._release(slot)
        yield None
        for event in step.events:
            if not isinstance(event, _BEFORE_TOKENS):
                yield from self._release(event.session_slot)
                yield from self._encode(event)

    def _encode(self, event: SessionEvent) -> list[engine_pb2.Output]:
        """Return an event's outputs; an event that cannot be encoded ends its own request, never the session."""
        slot = event.session_slot
        failure = self._failed.get(slot)
        if isinstance(event, Ended):
            self._wants_prompt_logprobs.discard(slot)
            self._failed.pop(slot, None)
            event = event if failure is None else _failed(event, failure)
        elif failure is not None:
            return []
        try:
            return self._encode_soundly(event)
        except Exception as error:
            return self._fail(event, error)

    def _encode_soundly(self, event: SessionEvent) -> list[engine_pb2.Output]:
        match event:
            case Started():
                if event.session_slot not in self._wants_prompt_logprobs:
                    return [wire.started(event, [])]
                self._held[event.session_slot] = (event, [])
            case PromptLogprobs():
                self._held[event.session_slot][1].extend(event.entries)
            case Loading():
                return [wire.loading(event)]
            case TokenWithLogprobs():
                return [wire.token(event)]
            case Ended():
                return [wire.ended(event)]
        return []

    def _release(self, slot: int) -> list[engine_pb2.Output]:
        """Return a start that was held back; empty if there is none."""
        if slot not in self._held:
            return []
        started, entries = self._held.pop(slot)
        try:
            return [wire.started(started, entries)]
        except Exception as error:
            return self._fail(started, error)

    def _fail(self, event: SessionEvent, error: Exception) -> list[engine_pb2.Output]:
        slot, doing = event.session_slot, "while its output was encoded"
        failure = internal_error(doing, error, slot=slot, kind=type(event).__name__)
        self._held.pop(slot, None)
        if isinstance(event, Ended):
            return [wire.ended(_failed(event, failure))]
        self._failed[slot] = failure
        self._abort(slot)
        return []


def _failed(event: Ended, failure: LoraplexError) -> Ended:
    """Return an end with another outcome; what the request used stays."""
    return replace(event, finish_reason=None, stop_token_id=None, error=failure)
