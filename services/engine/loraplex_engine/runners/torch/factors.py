"""DoRA's factors c, computed when an adapter enters the pool: ``c = m / ||W + s B A||``, the norm of each row.

Only the engine has W, in the numbers that its products read, so images hold the magnitudes m and this replaces them in the
pool. The norm is taken over W + s B A itself, a few rows at a time: computing it from ``||W||^2``, ``W A^T`` and ``A A^T`` costs
the same product and loses all digits where the delta cancels a row.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.rank_group import RankGroup
    from loraplex_engine.runners.torch.adapter_table import AdapterTable
    from loraplex_engine.runners.torch.adapter_views import Magnitudes

MAX_KEPT_BYTES: Final = 256 * 1024 * 1024
"""Factors kept on the host, 5.2 MiB for all projections of a 7B model: an adapter that comes back is copied, not computed."""
SLICE_ITEMS: Final = 1 << 18
"""Elements of W that are widened at a time: they stay in a core's cache, and the interpreter is free in between."""


class KeptFactors:
    """Factors computed last, by revision, on the host; may be used from several threads.

    Args:
        max_bytes: Bytes of all together; the ones used longest ago are forgotten first.
    """

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def get(self, digest: str) -> Tensor | None:
        """Return an adapter's factors, fp32, in the order of its magnitudes."""
        with self._lock:
            found = self._kept.get(digest)
            if found is not None:
                self._kept.move_to_end(digest)
            return found

    def put(self, digest: str, factors: Tensor) -> None:
        """Keep an adapter's factors, unless they alone are too large."""
        with self._lock:
            if digest in self._kept or factors.nbytes > self._max_bytes:
                return
            self._kept[digest] = factors
            self.num_bytes += factors.nbytes
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= self._kept.popitem(last=False)[1].nbytes


class FactorWriter:
    """Replaces magnitudes in the pool by factors.

    Args:
        linears: The model's fused products, by layer and op.
        group: The ranks that have a part of W each; all write the same adapters in one order.

    Attributes:
        kept: Factors that need not be computed again.
    """

    def __init__(
        self,
        linears: Sequence[Mapping[str, Linear]],
        kept: KeptFactors | None = None,
        group: RankGroup | None = None,
    ) -> None:
        self._linears, self._group = linears, group
        self.kept = kept or KeptFactors()

    def write(self, digest: str, table: AdapterTable) -> None:
        """Replace an adapter's magnitudes; its image must be in the pool."""
        if not table.magnitudes:
            return
        factors = self.kept.get(digest)
        if factors is None:
            computed = torch.cat([self._compute(table, each) for each in table.magnitudes])
            self.kept.put(digest, computed.cpu())
            factors = computed
        tiles = [tile.values for each in table.magnitudes for tile in each.tiles]
        for values, part in zip(tiles, torch.split(factors, [len(values) for values in tiles]), strict=True):
            values.copy_(part)

    def _compute(self, table: AdapterTable, magnitudes: Magnitudes) -> Tensor:
        layer, op = magnitudes.layer, magnitudes.op
        pair = None
        if magnitudes.part is not None:
            adapter = table.op(layer, op)
            assert adapter is not None
            pair = adapter.pair(magnitudes.part)
        norms = row_norms(self._linears[layer][op], magnitudes.first, magnitudes.last, pair)
        if self._group is not None and magnitudes.sums_over_ranks:
            squares = norms.square()
            self._group.all_reduce_of_load(squares)
            norms = squares.sqrt()
        values = torch.cat([tile.values for tile in magnitudes.tiles])
        return torch.where(norms > 0, values / norms, 0)  # a row of zeros stays one, whatever its factor


def row_norms(linear: Linear, first: int, last: int, pair: tuple[Tensor, Tensor, float] | None) -> Tensor:
    """Return the norms of rows ``[first, last)`` of ``W + scaling * B A``, fp32 ``[last - first]``.

    Args:
        linear: Has W.
        first: First row.
        last: One past the last row.
        pair: A ``[rank, in_features]`` and B ``[last - first, rank]``, fp32, and the scaling; None for W alone.
    """
    step = max(1, SLICE_ITEMS // linear.in_features)
    norms = []
    for start in range(first, last, step):
        stop = min(start + step, last)
        rows = linear.rows(start, stop).float()
        if pair is not None:
            a, b, scaling = pair
            rows = torch.addmm(rows, b[start - first : stop - first], a, alpha=scaling)
        norms.append(torch.linalg.vector_norm(rows, dim=1))
    return torch.cat(norms)
