"""Counts how much service each fairness key has had, in one virtual token counter per key.

A key's counter rises by one per prompt token computed, by two per token drawn, and by the tokens' worth of room of each
adapter loaded for it. The key with the lowest counter is served next. A key that comes back after it had nothing
waiting is lifted to the lowest counter among the keys that wait, so no key saves up service while it is away. For keys
that always have requests waiting, the services differ by a bound that does not grow with time.

Source: Sheng et al., "Fairness in Serving Large Language Models" (VTC), arXiv:2401.00588, algorithm 2.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROMPT_WEIGHT: Final = 1.0
OUTPUT_WEIGHT: Final = 2.0
_FIRST_SIZE: Final = 64


class FairShares:
    """Counters of all keys that still matter.

    Args:
        max_running_per_key: Most requests of a key that run at once; None for no limit.
    """

    def __init__(self, *, max_running_per_key: int | None = None) -> None:
        self._max_running = max_running_per_key
        self._indices: dict[str, int] = {}
        self._names: list[str] = []
        self._free: list[int] = []
        self._service = np.zeros(_FIRST_SIZE)
        self._num_open: list[int] = []
        self._num_waiting: list[int] = []  # parked ones included
        self._num_eligible: list[int] = []
        self._num_running: list[int] = []
        self._heap: list[tuple[float, int]] = []  # keys with eligible requests; a counter may have risen since
        self._is_in_heap: list[bool] = []
        self._last_left = -1  # the key that last ceased to wait
        self._sweep_at = 2 * _FIRST_SIZE

    def __len__(self) -> int:
        return len(self._indices)

    def enter(self, key: str) -> int:
        """Take in one more request of a key and return the key's index."""
        index = self._indices.get(key)
        if index is None:
            if len(self._indices) >= self._sweep_at:
                self._sweep()
            index = self._add(key)
        self._num_open[index] += 1
        return index

    def leave(self, index: int) -> None:
        """Count that one request of a key has ended."""
        self._num_open[index] -= 1

    def _add(self, key: str) -> int:
        if self._free:
            index = self._free.pop()
            self._names[index] = key
        else:
            index = len(self._names)
            self._names.append(key)
            for counts in (self._num_open, self._num_waiting, self._num_eligible, self._num_running):
                counts.append(0)
            self._is_in_heap.append(False)
            if index == len(self._service):
                self._service = np.concatenate([self._service, np.zeros(index)])
        self._service[index] = 0.0
        self._indices[key] = index
        return index

    def _sweep(self) -> None:
        """Forget keys without requests whose counter would be lifted anyway; amortised over the keys that came."""
        floor = self._lowest()
        for key, index in list(self._indices.items()):
            is_in_use = self._num_open[index] or index == self._last_left
            if not is_in_use and self._service[index] <= floor:
                del self._indices[key]
                self._free.append(index)
        self._sweep_at = max(2 * _FIRST_SIZE, 2 * len(self._indices))

    # --- waiting and running ---

    def wait(self, index: int) -> None:
        """Count one more request of a key as waiting."""
        if self._num_waiting[index] == 0:
            self._service[index] = max(self._service[index], self._lowest())
        self._num_waiting[index] += 1

    def cease_to_wait(self, index: int) -> None:
        """Count one request fewer of a key as waiting."""
        self._num_waiting[index] -= 1
        if self._num_waiting[index] == 0:
            self._last_left = index

    def become_eligible(self, index: int) -> None:
        """Count one more waiting request of a key as open to admission."""
        self._num_eligible[index] += 1
        if not self._is_in_heap[index]:
            self._is_in_heap[index] = True
            heapq.heappush(self._heap, (float(self._service[index]), index))

    def cease_to_be_eligible(self, index: int) -> None:
        """Count one waiting request fewer of a key as open to admission."""
        self._num_eligible[index] -= 1

    def run(self, index: int) -> None:
        """Count one more request of a key as running."""
        self._num_running[index] += 1

    def cease_to_run(self, index: int) -> None:
        """Count that one request of a key has lost its slot."""
        self._num_running[index] -= 1

    def is_capped(self, index: int) -> bool:
        """Tell whether no further request of a key may run now."""
        return self._max_running is not None and self._num_running[index] >= self._max_running

    def _lowest(self) -> float:
        """Return the lowest counter among keys with eligible requests, else that of the last key that waited."""
        heap = self._heap
        while heap:
            service, index = heap[0]
            current = float(self._service[index])
            if self._num_eligible[index] == 0:
                heapq.heappop(heap)
                self._is_in_heap[index] = False
            elif current != service:
                heapq.heapreplace(heap, (current, index))
            else:
                return service
        return float(self._service[self._last_left]) if self._last_left >= 0 else 0.0

    # --- service ---

    def service(self, index: int) -> float:
        """Return a key's counter."""
        return float(self._service[index])

    def service_of(self, key: str) -> float:
        """Return a key's counter; 0 if it is not known."""
        index = self._indices.get(key)
        return 0.0 if index is None else self.service(index)

    def charge(self, index: int, num_tokens: float) -> None:
        """Charge prompt tokens, or other service worth as many."""
        self._service[index] += PROMPT_WEIGHT * num_tokens

    def charge_outputs(self, indices: NDArray[np.int32], num_tokens: int = 1) -> None:
        """Charge drawn tokens to the key of each row, ``num_tokens`` to each; int32 ``[num_rows]``."""
        np.add.at(self._service, indices, OUTPUT_WEIGHT * num_tokens)

    def check_integrity(self, waiting: list[int], eligible: list[int], running: list[int]) -> None:
        """Compare the counts with the indices of all waiting, eligible and running requests.

        Raises:
            RuntimeError: If a count is off.
        """
        size = len(self._names)
        for name, indices, counts in (
            ("wait", waiting, self._num_waiting),
            ("are eligible", eligible, self._num_eligible),
            ("run", running, self._num_running),
            ("are open", waiting + running, self._num_open),
        ):
            found = np.bincount(np.array(indices, dtype=np.int64), minlength=size).tolist()
            if found != counts:
                raise RuntimeError(f"{found} requests per fairness key {name}, accounted are {counts}")
