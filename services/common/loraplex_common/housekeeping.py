"""Work that goes on for ever and must not end its service: failures are logged, not too often, and tried again."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import LoraplexError
from loraplex_common.log import get_logger
from loraplex_common.tasks import deliver_cancellation

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

REPEAT_S: Final = 60.0
FIRST_PAUSE_S: Final = 0.5
MAX_PAUSE_S: Final = 30.0

_log = get_logger()


class Trouble:
    """A repeated failure: logged at once, then once a minute with its count, and when it is over.

    Without this, a full disk would get a full log in addition.

    Args:
        clock: Seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_at: float | None = None
        self._num_unsaid = 0

    def warn(self, event: str, **fields: Any) -> None:
        """Log a warning, unless one was logged less than a minute ago."""
        now = self._clock()
        if self._said_at is not None and now - self._said_at < REPEAT_S:
            self._num_unsaid += 1
            return
        if self._num_unsaid:
            fields["times_since"] = self._num_unsaid + 1
        self._said_at, self._num_unsaid = now, 0
        _log.warning(event, **fields)

    def over(self, event: str, **fields: Any) -> None:
        """Log that the work succeeds again, if it failed before."""
        if self._said_at is not None:
            _log.info(event, **fields)
        self._said_at, self._num_unsaid = None, 0


async def keep_doing(turn: Callable[[], Awaitable[object]], *, name: str, max_pause_s: float = MAX_PAUSE_S) -> None:
    """Take one turn after another until cancelled; the pause after a failure doubles up to ``max_pause_s``.

    Args:
        turn: Does the work, and waits while there is none.
        name: Name of the work, for the log.
        max_pause_s: Longest pause.
    """
    trouble, pause_s = Trouble(), FIRST_PAUSE_S
    while True:
        try:
            await turn()
        except LoraplexError as error:
            trouble.warn(f"{name} failed; trying again", error=error.message)
        except Exception as error:  # a bug, or unforeseen data: the service must go on
            trouble.warn(f"{name} failed unexpectedly; trying again", exc_info=error)
        else:
            trouble.over(f"{name} works again")
            pause_s = FIRST_PAUSE_S
            deliver_cancellation()
            continue
        deliver_cancellation()
        await asyncio.sleep(min(pause_s, max_pause_s))
        pause_s *= 2


async def until_done(work: Callable[[], Awaitable[object]], *, name: str) -> None:
    """Do work once; as long as another part is away, try again after pauses that double up to `MAX_PAUSE_S`.

    Args:
        work: Does the work.
        name: Name of the work, for the log.

    Raises:
        Exception: What the work raises, but for a `LoraplexError`.
    """
    trouble, pause_s = Trouble(), FIRST_PAUSE_S
    while True:
        try:
            await work()
        except LoraplexError as error:
            trouble.warn(f"{name} failed; trying again", error=error.message)
        else:
            return
        deliver_cancellation()
        await asyncio.sleep(min(pause_s, MAX_PAUSE_S))
        pause_s *= 2
