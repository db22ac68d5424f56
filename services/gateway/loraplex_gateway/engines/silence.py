"""Tells a peer that is silent for too long from one that this process had no time to listen to."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_S: Final = 0.25
SILENCE_S: Final = 5.0
"""Default limit."""
QUIET_SHARE: Final = 0.5
"""Share of the limit after which a peer is not the first choice for something new."""
MAX_MISSED: Final = 5
"""Messages that a peer may leave out where it says how often it sends them."""


async def wait_for_silence(num_heard: Callable[[], int], limit_s: Callable[[], float]) -> float:
    """Return once nothing has been heard for too long: for how many seconds.

    Counts looks and not the clock: a loop that has been busy has everything it missed still before it.

    Args:
        num_heard: Messages so far.
        limit_s: How long is too long, as known by now.
    """
    clock = asyncio.get_running_loop().time
    looked_at, seen, silent_s = clock(), num_heard(), 0.0
    while silent_s < limit_s():
        await asyncio.sleep(min(LOOK_S, limit_s() / 4))
        now = clock()
        silent_s = silent_s + min(now - looked_at, 2 * LOOK_S) if num_heard() == seen else 0.0
        looked_at, seen = now, num_heard()
    return silent_s
