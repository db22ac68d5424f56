"""All adapters that a trace may ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec

from loraplex_engine.simulation.shapes import ATTENTION_TARGETS, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from loraplex_engine.simulation.shapes import AdapterSize, ModelShape


class Adapters:
    """Adapter i has rank ``ranks[i % len(ranks)]``; a spec names one module only, since only sizes matter here.

    Attributes:
        num_pages: int32 ``[n]``; pages of each image.
        weight_bytes: int64 ``[n]``; bytes of each adapter that a step reads.
        traffic_bytes: int64 ``[n]``; activations read and written per token.
        num_ops: Fused projections of a layer that they adapt, the same for all adapters. ``num_projections``: the same,
            each projection counted by itself.
        digests: By index.
    """

    def __init__(
        self,
        shape: ModelShape,
        num_adapters: int,
        ranks: Sequence[int],
        targets: tuple[str, ...] = ATTENTION_TARGETS,
    ) -> None:
        if num_adapters and not ranks:
            raise ShapeError("adapters need at least one rank")
        self.sizes: list[AdapterSize] = [shape.adapter(rank, targets) for rank in ranks]
        self.num_ops = self.sizes[0].num_ops if self.sizes else 0
        self.num_projections = self.sizes[0].num_projections if self.sizes else 0
        which = np.arange(num_adapters) % max(1, len(ranks))
        self.num_pages = _column([size.num_pages for size in self.sizes], which).astype(np.int32)
        self.weight_bytes = _column([size.weight_bytes for size in self.sizes], which)
        self.traffic_bytes = _column([size.traffic_bytes for size in self.sizes], which)
        self.digests = [f"{index:064x}" for index in range(num_adapters)]
        self._modules = [(ModuleSpec.low_rank(0, "q_proj", rank, 1.0),) for rank in ranks]

    def __len__(self) -> int:
        return len(self.digests)

    def spec(self, index: int) -> AdapterSpec:
        """Return an adapter's spec."""
        return AdapterSpec(self.digests[index], self._modules[index % len(self._modules)])

    @staticmethod
    def index_of(digest: str) -> int:
        """Return the index of a digest."""
        return int(digest, 16)


def _column(values: list[int], which: NDArray[np.intp]) -> NDArray[np.int64]:
    return np.array(values or [0], dtype=np.int64).take(which)
