"""A harness of sequences that add several adapters up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from loraplex_engine.step import MoreAdapters
from support.plans import Harness, Sequence_

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loraplex_engine.model_runner import ModelRunner
    from loraplex_engine.pool_geometry import PoolGeometry
    from loraplex_engine.step import StepPlan


class ListHarness(Harness):
    """A harness of sequences with several adapters each.

    Attributes:
        more: By slot, adapters besides the first, with their scales.
    """

    def __init__(self, runner: ModelRunner, geometry: PoolGeometry, num_pages: int) -> None:
        super().__init__(runner, geometry, num_pages)
        self.more: dict[int, list[tuple[int, float]]] = {}

    def add_list(self, prompt: Iterable[int], adapters: Sequence[tuple[int, float]], **fields: object) -> Sequence_:
        """Make a sequence with these (adapter, scale) in a new slot."""
        index, scale = adapters[0] if adapters else (-1, 1.0)
        row = self.add(prompt, adapter=index, scale=scale, **fields)
        self.more[row.slot] = list(adapters[1:])
        return row

    def plan(self, sequences: Sequence[Sequence_]) -> StepPlan:
        """See `Harness`."""
        plan = super().plan(sequences)
        entries = [(row, *entry) for row, slot in enumerate(plan.slots.tolist()) for entry in self.more[slot]]
        return replace(
            plan,
            more_adapters=MoreAdapters(
                rows=np.array([entry[0] for entry in entries], dtype=np.int32),
                adapters=np.array([entry[1] for entry in entries], dtype=np.int32),
                scales=np.array([entry[2] for entry in entries], dtype=np.float32),
            ),
        )
