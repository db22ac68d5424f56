"""Collects per session what happens between two sends."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loraplex_engine.messages import SessionEvent, StepOutputs

_NONE = np.empty(0, dtype=np.int32)

_Tokens = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


class OutputCollector:
    """Events and tokens of all sessions since the last `take`."""

    def __init__(self) -> None:
        self._events: dict[int, list[SessionEvent]] = {}
        self._tokens: dict[int, list[_Tokens]] = {}

    def event(self, session_id: int, event: SessionEvent) -> None:
        """Add an event."""
        self._events.setdefault(session_id, []).append(event)

    def tokens(
        self,
        sessions: NDArray[np.int64],
        session_slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        token_ids: NDArray[np.int32],
    ) -> None:
        """Add plain tokens, given in parallel arrays; one vector operation per session."""
        if len(sessions) == 0:
            return
        first = int(sessions[0])
        if (sessions == first).all():
            self._tokens.setdefault(first, []).append((session_slots, positions, token_ids))
            return
        for session in np.unique(sessions).tolist():
            of = sessions == session
            self._tokens.setdefault(session, []).append((session_slots[of], positions[of], token_ids[of]))

    def forget(self, session_id: int) -> None:
        """Drop what is collected for a session that is gone."""
        self._events.pop(session_id, None)
        self._tokens.pop(session_id, None)

    def take(self, step_id: int) -> dict[int, StepOutputs]:
        """Return and forget everything collected: session -> outputs."""
        if not self._events and not self._tokens:
            return {}
        outputs = {}
        for session in self._events.keys() | self._tokens.keys():
            parts = self._tokens.get(session, [(_NONE, _NONE, _NONE)])
            slots, positions, ids = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
            outputs[session] = StepOutputs(
                step_id=step_id,
                token_slots=slots,
                token_positions=positions,
                token_ids=ids,
                events=self._events.get(session, []),
            )
        self._events.clear()
        self._tokens.clear()
        return outputs
