"""Indices of the runner's adapter table, and the order in which idle adapters give way."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from loraplex_engine.residency import NEVER, Adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class TableIndices:
    """Free and used indices; one that steps in flight may name is unbound and free only when they are done."""

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
        """Give an index back; ``last_step`` is the last that may name it."""
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
        """Recount.

        Raises:
            RuntimeError: If an index has two owners.
        """
        indices = used + self._free + [index for _, index in self._retiring]
        if len(set(indices)) != len(indices):
            raise RuntimeError(f"an index of the adapter table has two owners: {sorted(indices)}")


class IdleOrder:
    """Adapters that nobody leases or pins, least recently used first.

    Attributes:
        num_pages: Pages that evicting them all would free.
    """

    def __init__(self) -> None:
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self.num_pages = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def place(self, adapter: Adapter) -> None:
        """Put an adapter at the end, or take it off, as its state, leases and pin demand."""
        if self._adapters.pop(adapter.digest, None) is not None:
            self.num_pages -= adapter.num_pages
        if adapter.is_idle:
            self._adapters[adapter.digest] = adapter
            self.num_pages += adapter.num_pages

    def choose(self, num_pages: int, may_evict: Callable[[str], bool]) -> list[Adapter] | None:
        """Return the first adapters that may go and free ``num_pages`` together; None if all of them are too few."""
        chosen: list[Adapter] = []
        if num_pages > self.num_pages:
            return None
        for adapter in self:
            if num_pages <= 0:
                break
            if may_evict(adapter.digest):
                chosen.append(adapter)
                num_pages -= adapter.num_pages
        return chosen if num_pages <= 0 else None

    def check_integrity(self, adapters: list[Adapter]) -> None:
        """Recount.

        Raises:
            RuntimeError: If an adapter is missing or listed wrongly.
        """
        idle = {adapter.digest for adapter in adapters if adapter.is_idle}
        pages = sum(adapter.num_pages for adapter in adapters if adapter.is_idle)
        if idle != set(self._adapters) or pages != self.num_pages:
            raise RuntimeError(
                f"{idle} are idle with {pages} pages, {set(self._adapters)} listed with {self.num_pages}"
            )
