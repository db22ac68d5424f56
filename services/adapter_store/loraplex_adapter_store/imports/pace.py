"""Ends arrivals that are too slow, as they would hold room that other imports need, and waits for busy servers."""

from __future__ import annotations

import random
import time
from typing import Final

from loraplex_common.errors import DeadlineError

WINDOW_S: Final = 30.0
MIN_WINDOW_BYTES: Final = 256 * 1024
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 10.0


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


class Pause:
    """Waits before a request to a busy server is sent again: twice as long each time, with jitter.

    Args:
        patience_s: Longest time from now in which requests are sent again.
    """

    def __init__(self, patience_s: float) -> None:
        self._end_s = time.monotonic() + patience_s
        self._pause_s = FIRST_PAUSE_S

    def again(self, retry_after: str) -> bool:
        """Wait, in this thread, and return True; False if the time for it is over.

        Args:
            retry_after: The server's own wish in seconds; anything else counts as none.
        """
        wish_s = float(retry_after[:6]) if retry_after.isdecimal() else 0.0
        wait_s = max(wish_s, self._pause_s * random.uniform(0.5, 1.0))
        if time.monotonic() + wait_s > self._end_s:
            return False
        time.sleep(wait_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return True
