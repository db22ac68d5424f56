"""One connection after another to the same peer, with a pause in between."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def keep_connected(hold: Callable[[], Awaitable[bool]], *, first_pause_s: float, max_pause_s: float) -> NoReturn:
    """Hold one connection after another until cancelled.

    The pause doubles from connection to connection, and starts anew after a connection that worked. Half of it is
    random, so that the clients of a peer that comes back do not all arrive at once.

    Args:
        hold: Connects, holds the connection to its end, and returns whether the peer ever answered on it. What it raises
            ends the loop.
        first_pause_s: Pause after a connection that worked, in seconds.
        max_pause_s: Longest pause, in seconds.
    """
    pause_s = first_pause_s
    while True:
        if await hold():
            pause_s = first_pause_s
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, max_pause_s)
