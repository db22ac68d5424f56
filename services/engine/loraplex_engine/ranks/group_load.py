"""An adapter on its way into the pools of all ranks: no step may read it before the last one has it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from loraplex_engine.ranks.rank_line import Word

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.model_runner import LoadHandle
    from loraplex_engine.ranks.rank_line import Said


class GroupLoad:
    """See `LoadHandle`.

    Args:
        num_others: Ranks besides rank 0.
    """

    def __init__(self, num_others: int) -> None:
        self._own: LoadHandle | None = None
        self._left = num_others + 1
        self._failure: str | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def follow(self, own: LoadHandle) -> None:
        """Wait for rank 0's part, too."""
        self._own = own
        own.add_done_callback(self._one_more)

    def answer(self, said: Said) -> None:
        """Take the answer of another rank; from any thread."""
        if said.word is Word.LOAD_FAILED:
            self._failure = said.text
        self._one_more()

    @property
    def is_answered(self) -> bool:
        """Whether all ranks have answered."""
        return not self._left

    def is_done(self) -> bool:
        """Tell whether all ranks have the adapter.

        Raises:
            RuntimeError: If another rank does not have it, and ranks would differ from now on.
            LoraplexError: As rank 0's part raises it.
        """
        if self._left:
            return False
        if self._failure is not None:
            raise RuntimeError(f"a rank could not load an adapter: {self._failure}")
        assert self._own is not None
        return self._own.is_done()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have a function called once all ranks have answered; at once if they have."""
        with self._lock:
            if self._left:
                self._callbacks.append(callback)
                return
        callback()

    def _one_more(self) -> None:
        with self._lock:
            self._left -= 1
            callbacks = [] if self._left else self._callbacks
        for callback in callbacks:
            callback()
