"""Measures for how long the adapter store has said nothing although something waits for it."""

from __future__ import annotations

from typing import Final

LOOK_S: Final = 0.25
"""Seconds between two looks."""
LEAST_S: Final = 10.0
"""Shortest silence for which a connected store is given up: it may be at work on a large image."""


class StoreSilence:
    """The silence of a store that is away, or connected and owes an answer.

    Counts looks and not the clock: a loop that has been busy has everything it missed still before it.

    Args:
        wait_s: How long the requests that need the store wait for it.

    Attributes:
        seconds: Length of the silence up to now.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._owed: set[str] = set()
        self.seconds = 0.0

    def heard(self) -> None:
        """Note a message of the store."""
        self.seconds = 0.0

    def owes(self, digest: str) -> None:
        """Note that the store has been asked for an image, or to fill its slots."""
        self._owed.add(digest)

    def owes_no_more(self, digest: str) -> None:
        """Note that the store has answered, or that the image is not wanted any more."""
        self._owed.discard(digest)

    def disconnected(self) -> None:
        """Note that the stream has ended; the silence goes on."""
        self._owed.clear()

    def look(self, elapsed_s: float, *, is_attached: bool) -> bool:
        """Count one more look; return whether the silence has become too long.

        Args:
            elapsed_s: Time since the look before.
            is_attached: Whether a store is connected.
        """
        if is_attached and not self._owed:
            self.seconds = 0.0
            return False
        self.seconds += min(elapsed_s, 2 * LOOK_S)
        return self.seconds > (max(self._wait_s, LEAST_S) if is_attached else self._wait_s)
