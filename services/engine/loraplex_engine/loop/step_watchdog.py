"""Notices a step loop that hangs, for example in a device call that never returns; the loop's own thread could not.

The loop notes what it begins (`Pulse`), two words per step; a thread of the watchdog's own looks at the note now and
then. The watchdog counts its looks and not the time: while the whole process does not run (it is stopped, or the
machine is busy), no look counts against the loop.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_S: Final = 0.25
SLACK: Final = 5.0
"""A step may take this many times its expected time."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What the loop has begun last.

    Attributes:
        expected_s: How long it should take; 0 if it takes next to no time.
        is_asleep: Whether the loop waits for work; it is late only if a command has come.
    """

    expected_s: float = 0.0
    is_asleep: bool = False


class Pulse:
    """The loop's sign of life: the loop's thread writes it, the watchdog reads it.

    Attributes:
        beat: The newest beat; a new object each time.
    """

    def __init__(self) -> None:
        self.beat = Beat(is_asleep=True)

    def works(self, expected_s: float = 0.0) -> None:
        """Note that work begins which should take ``expected_s``."""
        self.beat = Beat(expected_s)

    def sleeps(self) -> None:
        """Note that there is nothing to do."""
        self.beat = Beat(is_asleep=True)


class StepWatchdog:
    """Reports once if the step loop makes no progress for too long.

    Args:
        pulse: The loop's sign of life.
        has_work: Tells whether a command waits for the loop.
        patience_s: The least time that counts as too long. The limit is this, or `SLACK` times the expected time of the
            present work if that is longer. None turns the watchdog off.
        on_hang: Called with a description, on the watchdog's thread, as the loop's own cannot be reached any more.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        pulse: Pulse,
        *,
        has_work: Callable[[], bool],
        patience_s: float | None,
        on_hang: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pulse = pulse
        self._has_work = has_work
        self._patience_s = math.inf if patience_s is None else patience_s
        self._on_hang = on_hang
        self._clock = clock
        self._seen = pulse.beat
        self._silent_s = 0.0
        self._looked_s = clock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="step-watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._looked_s = self._clock()
        if self._patience_s < math.inf:
            self._thread.start()

    def stop(self) -> None:
        """End the thread; returns once it has ended."""
        self._is_over.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def look(self) -> str | None:
        """Look once; return what is wrong, or None if the loop makes progress."""
        now_s, beat = self._clock(), self._pulse.beat
        passed_s = min(now_s - self._looked_s, 2 * LOOK_S)
        self._looked_s = now_s
        if beat is not self._seen or (beat.is_asleep and not self._has_work()):
            self._seen, self._silent_s = beat, 0.0
            return None
        self._silent_s += passed_s
        if self._silent_s < max(self._patience_s, SLACK * beat.expected_s):
            return None
        doing = f"a step of about {beat.expected_s:.3g} s" if beat.expected_s else "the work between two steps"
        return f"the step loop has not got on for {self._silent_s:.1f} s with {doing}"

    def _run(self) -> None:
        while not self._is_over.wait(min(LOOK_S, self._patience_s / 4)):
            if (trouble := self.look()) is not None:
                self._on_hang(trouble)
                return
