"""Whether an engine lives, by what it says on its session: the registry cannot tell while it takes no writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.registry import ENGINE_LEASE_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex.v1 import engine_pb2

PROOF_S: Final = ENGINE_LEASE_S
"""A proof holds as long as a lease would. An idle engine says something every second."""


class Liveness:
    """Remembers when an engine last spoke, and when it last got on with its work.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._position: tuple[int, int] | None = None
        self._heard_at = self._moved_at = float("-inf")

    def hear(self, message: engine_pb2.SessionResponse, *, has_work: bool) -> None:
        """Take note of a message.

        Args:
            message: What it said.
            has_work: Whether requests of this gateway are on the engine.
        """
        self._heard_at = now = self._clock()
        # A step that did something for this gateway raises the step; one that did something for any gateway changes the load.
        position = (message.step, message.load.sequence)
        is_idle = not has_work or message.load.running == 0
        if is_idle or position != self._position:
            self._moved_at = now
        self._position = position

    def forget(self) -> None:
        """Forget everything: the session has ended."""
        self._position = None
        self._heard_at = self._moved_at = float("-inf")

    @property
    def is_proven(self) -> bool:
        """Whether the engine has spoken, and got on with its work if it has any, within `PROOF_S`."""
        return self._clock() - min(self._heard_at, self._moved_at) < PROOF_S
