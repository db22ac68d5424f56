"""Indices of the runner's adapter table."""

from __future__ import annotations

from collections import deque

from loraplex_engine.adapters.adapter import NEVER


class TableIndices:
    """Free and used indices; an index that steps in flight may name is unbound, and free, only when they are done."""

    def __init__(self, size: int) -> None:
        self._free = list(range(size - 1, -1, -1))
        self._retiring: deque[tuple[int, int]] = deque()  # (step id, index), by rising step id
        self._unloads: list[int] = []
        self._completed_step = NEVER

    @property
    def num_free(self) -> int:
        """Indices that can be taken now."""
        return len(self._free)

    @property
    def num_retiring(self) -> int:
        """Indices that are free when steps in flight are done."""
        return len(self._retiring)

    def take(self) -> int:
        """Take a free index."""
        return self._free.pop()

    def give_back(self, index: int) -> None:
        """Give back an index that the runner never bound."""
        self._free.append(index)

    def retire(self, index: int, last_step: int) -> None:
        """Give an index back; ``last_step`` is the last step that may name it."""
        self._retiring.append((max(last_step, self._retiring[-1][0] if self._retiring else NEVER), index))
        self.complete(self._completed_step)

    def complete(self, step_id: int) -> None:
        """Note that the device is done with all steps up to ``step_id``."""
        self._completed_step = max(self._completed_step, step_id)
        while self._retiring and self._retiring[0][0] <= self._completed_step:
            index = self._retiring.popleft()[1]
            self._free.append(index)
            self._unloads.append(index)

    def take_unloads(self) -> list[int]:
        """Return and forget the indices to unbind."""
        unloads, self._unloads = self._unloads, []
        return unloads

    def check_integrity(self, used: list[int]) -> None:
        """Recount the indices.

        Raises:
            RuntimeError: If an index has two owners.
        """
        indices = used + self._free + [index for _, index in self._retiring]
        if len(set(indices)) != len(indices):
            raise RuntimeError(f"an index of the adapter table has two owners: {sorted(indices)}")
