"""Ends arrivals that are too slow: they would hold room that other imports need."""

from __future__ import annotations

from typing import Final

from loraplex_common.errors import DeadlineError

WINDOW_S: Final = 30.0
MIN_WINDOW_BYTES: Final = 256 * 1024


class Pace:
    """Measures the pace of an arrival.

    Args:
        what: Name of what arrives, for the error.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._num_bytes = 0
        self._spent_s = 0.0

    def came(self, num_bytes: int, waited_s: float) -> None:
        """Add bytes, and the time that was spent waiting for them.

        Raises:
            DeadlineError: If less than `MIN_WINDOW_BYTES` have come in `WINDOW_S`.
        """
        self._num_bytes, self._spent_s = self._num_bytes + num_bytes, self._spent_s + waited_s
        if self._spent_s < WINDOW_S:
            return
        if self._num_bytes < MIN_WINDOW_BYTES:
            raise DeadlineError(f"{self._what} is too slow: {self._num_bytes} bytes in {self._spent_s:.0f} s")
        self._num_bytes, self._spent_s = 0, 0.0
