"""Pairs with both factors divided over tensor-parallel ranks, as S-LoRA has them; where that is faster (`rank_split`).

A rank computes its part of ``A x`` of all segments of a fused projection, one collective makes it whole on all ranks, and each adds
what B makes of it in its own outputs. Behind a row-parallel product these are a part of all outputs, and the base's all-reduce, which
sums up partial sums, brings them to the others.

    column-parallel   rank r has rows `share` of A of R stacked ranks; numbers gathered [degree, sum of ceil(R / degree) * tokens]
    row-parallel      rank r has its inputs' columns of A; numbers summed up [sum of R * tokens]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loraplex_common.adapter_image import ITEM_BYTES
from loraplex_common.log import get_logger
from loraplex_common.projections import Split

from loraplex_engine.rank_split import PairLoad, PairSplit, share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.adapter_image import Geometry
    from torch import Tensor

    from loraplex_engine.rank_group import RankGroup
    from loraplex_engine.rank_split import RankRates
    from loraplex_engine.runners.torch.segment import Segment, Term

_log = get_logger()


class Deltas:
    """What the pairs of one fused projection make of a step's rows, on one rank.

    Args:
        h: ``A x`` times the requests' own factors, fp32 ``[rank, tokens]`` for each slice, of each segment with pairs.
        outputs: Outputs ``[first, last)`` to which this rank adds what B makes of it; None for all that it computes.
    """

    def __init__(self, h: dict[Segment, tuple[Tensor, ...]], outputs: tuple[int, int] | None) -> None:
        self._h, self._outputs = h, outputs

    def add(self, term: Term, total: Tensor) -> None:
        """Add an adapter's pairs in place to fp32 ``[tokens, out_features]`` of its segment."""
        parts = self._h[term.segment]
        for start, stop, part, b, scaling in term.adapter.expand:
            first, last = (start, stop) if self._outputs is None else _common((start, stop), self._outputs)
            if first < last:
                total[:, first:last].t().addmm_(b[first - start : last - start].float(), parts[part], alpha=scaling)

    def add_to(self, terms: Sequence[Term], y: Tensor) -> None:
        """Add the pairs of adapters that have the same tokens to the whole step's output; it is rounded once."""
        rows = y[terms[0].segment.tokens]
        total = rows.float()
        for term in terms:
            self.add(term, total)
        if total is not rows:
            rows.copy_(total)


class DividedPairs:
    """Divides pairs over the ranks of a group, or has them computed with whole factors, projection by projection.

    All ranks choose alike, as they choose by the step's plan and the adapters' specs alone.

    Args:
        group: This rank's end of the group.
        geometry: The geometry of adapter images.
        choice: What to do; a `RankRates` has the faster way chosen for each projection of each step.

    Attributes:
        counts: Projections of steps that were computed each way.
    """

    def __init__(self, group: RankGroup, geometry: Geometry, choice: PairSplit | RankRates) -> None:
        self._group, self._geometry, self._choice = group, geometry, choice
        self._logged: set[tuple[int, PairSplit]] = set()
        self.counts = dict.fromkeys(PairSplit, 0)

    def deltas(self, terms: Sequence[Term], x: Tensor) -> Deltas | None:
        """Return what the pairs of a fused projection make of the step's rows; None if whole factors are to be used.

        Args:
            terms: Those of the step's segments that have pairs there.
            x: Its input, ``[T, in_features]``.
        """
        if not terms:
            return None
        chosen = self._chosen(terms)
        self.counts[chosen] += 1
        if chosen is PairSplit.WHOLE:
            return None
        op = self._geometry.ops[terms[0].adapter.index]
        if op.projections[0].split is Split.INPUTS:
            h, width = self._summed(terms, x), sum(op.local_outputs(self._group.degree))
            outputs = share(width, self._group.rank, self._group.degree)
        else:
            h, outputs = self._gathered(terms, x), None
        return Deltas(
            {term.segment: _scaled(term, each) for term, each in zip(terms, h, strict=True)},
            outputs,
        )

    def load(self, terms: Sequence[Term]) -> PairLoad:
        """Return what the choice for a fused projection depends on."""
        degree = self._group.degree
        op = self._geometry.ops[terms[0].adapter.index]
        split = op.projections[0].split
        width = sum(op.local_outputs(degree)) if split is Split.INPUTS else op.local_columns(degree)
        adapters = {id(term.adapter): term.adapter for term in terms}
        ranks = sum(sum(adapter.slice_ranks) for adapter in adapters.values())
        h_size = sum(sum(term.adapter.slice_ranks) * term.segment.num_tokens for term in terms)
        return PairLoad(
            split=split,
            degree=degree,
            factor_bytes=ranks * width * ITEM_BYTES[self._geometry.dtype],
            products=h_size * width,
            h_size=h_size,
        )

    def _chosen(self, terms: Sequence[Term]) -> PairSplit:
        if isinstance(self._choice, PairSplit):
            return self._choice
        load = self.load(terms)
        chosen = load.faster(self._choice)
        self._log(terms[0].adapter.index, chosen, load, self._choice)
        return chosen

    def _log(self, op: int, chosen: PairSplit, load: PairLoad, rates: RankRates) -> None:
        """Say once for each projection and way when it is first chosen, on rank 0."""
        if self._group.rank or (op, chosen) in self._logged:
            return
        self._logged.add((op, chosen))
        _log.info(
            "how ranks divide adapters was chosen",
            projection=self._geometry.ops[op].name,
            split=chosen.value,
            factor_bytes=load.factor_bytes,
            h_size=load.h_size,
            whole_us=round(load.whole_s(rates) * 1e6, 1),
            divided_us=round(load.divided_s(rates) * 1e6, 1),
        )

    def _gathered(self, terms: Sequence[Term], x: Tensor) -> list[Tensor]:
        """Return ``A x`` of each term, fp32 ``[stacked rank, tokens]``; this rank computes its share of the rank rows."""
        rank, degree = self._group.rank, self._group.degree
        heights = [share(sum(term.adapter.slice_ranks), 0, degree)[1] for term in terms]
        sizes = [height * term.segment.num_tokens for height, term in zip(heights, terms, strict=True)]
        own = torch.zeros(sum(sizes), device=x.device)
        for term, height, piece in zip(terms, heights, torch.split(own, sizes), strict=True):
            first, last = share(sum(term.adapter.slice_ranks), rank, degree)
            _shrink(term, x, slice(first, last), piece.view(height, -1)[: last - first])
        gathered = own.new_empty((degree, len(own)))
        self._group.all_gather(own, gathered)
        pieces = torch.split(gathered, sizes, dim=1)
        return [
            piece.reshape(degree * height, -1)[: sum(term.adapter.slice_ranks)]
            for term, height, piece in zip(terms, heights, pieces, strict=True)
        ]

    def _summed(self, terms: Sequence[Term], x: Tensor) -> list[Tensor]:
        """Return ``A x`` of each term, fp32 ``[stacked rank, tokens]``; this rank computes with its columns of x."""
        heights = [sum(term.adapter.slice_ranks) for term in terms]
        sizes = [height * term.segment.num_tokens for height, term in zip(heights, terms, strict=True)]
        h = torch.zeros(sum(sizes), device=x.device)
        pieces = [piece.view(height, -1) for piece, height in zip(torch.split(h, sizes), heights, strict=True)]
        for term, piece in zip(terms, pieces, strict=True):
            _shrink(term, x, slice(None), piece)
        self._group.all_reduce(h)
        return pieces


def _shrink(term: Term, x: Tensor, rows: slice, out: Tensor) -> None:
    """Add rows of ``A x`` to fp32 ``[rows, tokens]``."""
    for start, stop, a in term.adapter.shrink:
        out.addmm_(a[rows].float(), term.segment.input_of(term.adapter.index, x, start, stop).float())


def _scaled(term: Term, h: Tensor) -> tuple[Tensor, ...]:
    """Return the slices of ``A x``, times the requests' own factors."""
    if term.segment.scales is not None:
        h.mul_(term.segment.scales)
    return torch.split(h, term.adapter.slice_ranks)


def _common(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Return the intersection of two ranges; the first bound is not less than the second if it is empty."""
    return max(one[0], other[0]), min(one[1], other[1])
