"""A display that Ctrl-C ends, whatever is under way: an interrupt raised inside a library may leave a lock of its taken."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_EVERY_S: Final = 0.1


class Display:
    """Work of another thread that draws, until it ends or Ctrl-C comes."""

    def __init__(self) -> None:
        self._is_ended = False
        self._drawing = threading.Lock()
        self._failure: BaseException | None = None

    def draw(self, action: Callable[[], None]) -> None:
        """Draw, unless Ctrl-C has come."""
        with self._drawing:
            if not self._is_ended:
                action()

    def run(self, work: Callable[[], None]) -> None:
        """Do work in a thread. Only the main thread may call this; it does nothing else meanwhile, so nothing is torn.

        Raises:
            KeyboardInterrupt: Once Ctrl-C has come; nothing is drawn afterwards, and the thread ends with the process.
            BaseException: What the work raises.
        """
        before = signal.signal(signal.SIGINT, self._end)
        try:
            thread = threading.Thread(target=self._work, args=(work,), name="display", daemon=True)
            thread.start()
            while thread.is_alive() and not self._is_ended:
                time.sleep(LOOK_EVERY_S)
            if self._is_ended:
                with self._drawing:  # what is being drawn
                    raise KeyboardInterrupt
            if self._failure is not None:
                raise self._failure
        finally:
            signal.signal(signal.SIGINT, before)

    def _end(self, *_: Any) -> None:
        self._is_ended = True

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # for the main thread to raise
            self._failure = error
