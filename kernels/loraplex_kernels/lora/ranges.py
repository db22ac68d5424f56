"""Ranges of the tile table, one for each resident adapter."""

from __future__ import annotations


class TableFullError(RuntimeError):
    """The tile table has no room for an adapter; the message holds the arithmetic."""


class RangeAllocator:
    """First-fit allocation of half-open ranges of ``[0, capacity)``."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._free = [(0, capacity)]
        self._used: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        """Return the start of a free range of ``size``.

        Raises:
            TableFullError: If no free range is that long.
        """
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[index : index + 1] = [(start + size, stop)] if stop - start > size else []
                if size:
                    self._used[start] = size
                return start
        free = sum(stop - start for start, stop in self._free)
        raise TableFullError(
            f"{size} tiles do not fit: {free} of {self._capacity} are free, in {len(self._free)} ranges"
        )

    def release(self, start: int, size: int) -> None:
        """Give back what `allocate` returned."""
        if size == 0:
            return
        if self._used.pop(start, None) != size:
            raise RuntimeError(f"range [{start}, {start + size}) was not allocated")
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self._free, (start, start + size)]):
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self._free = merged

    def check_integrity(self) -> None:
        """Raise RuntimeError unless free and used ranges tile ``[0, capacity)``."""
        free, used = sum(stop - start for start, stop in self._free), sum(self._used.values())
        if free + used != self._capacity:
            raise RuntimeError(f"free {free} + used {used} != capacity {self._capacity}")
