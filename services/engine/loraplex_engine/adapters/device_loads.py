"""Adapters on their way to the device and off it: what the step loop must have the runner bind and unbind."""

from __future__ import annotations

import itertools
import math

import numpy as np

from loraplex_engine.adapters.adapter import Adapter, AdapterLoad
from loraplex_engine.adapters.table_indices import TableIndices


class DeviceLoads:
    """Indices of the runner's adapter table, and the loads and unloads that the runner has yet to carry out.

    Args:
        max_resident: Size of the runner's adapter table.

    Attributes:
        indices: Indices of the table.
        max_resident: Size of the table.
    """

    def __init__(self, max_resident: int) -> None:
        self.indices = TableIndices(max_resident)
        self.max_resident = max_resident
        self._loads: list[AdapterLoad] = []
        self._generations = itertools.count(1)

    def start(self, adapter: Adapter, deadline_s: float = math.inf) -> None:
        """Give an adapter that has its pages an index and a new generation, and queue its load.

        Raises:
            RuntimeError: If it has no image or no pages.
        """
        if adapter.spec is None or adapter.pages is None:
            raise RuntimeError(f"adapter {adapter.digest} has no image or no pages")
        adapter.index = self.indices.take()
        adapter.generation = next(self._generations)
        self._loads.append(
            AdapterLoad(
                digest=adapter.digest,
                index=adapter.index,
                spec=adapter.spec,
                pages=adapter.pages.astype(np.int32),
                arena_slots=adapter.arena_slots,
                deadline_s=deadline_s,
            )
        )

    def take_unloads(self) -> list[int]:
        """Return and forget the indices to unbind; the runner must unbind them before the loads of the same turn."""
        return self.indices.take_unloads()

    def take_loads(self) -> list[AdapterLoad]:
        """Return and forget the loads to start, the most urgent first."""
        loads, self._loads = self._loads, []
        loads.sort(key=lambda load: load.deadline_s)
        return loads
