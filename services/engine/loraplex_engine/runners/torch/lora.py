"""LoRA over the unified pool, in torch: any mix of adapters and ranks in one step, read straight from pool pages.

`adapter_table.AdapterTable` holds views of an adapter's tiles in pages of the pool, made once per load. A step's rows are
ordered by adapter, so each adapter's tokens are one *segment*:

    y[segment, outputs] += scaling * (x[segment] @ A.T) @ B.T

Tokens without an adapter are in no segment and cost nothing. Tokens of requests that add several adapters up are in a segment
of each of them. Adapters with other parts: `parts`.

Source: Hu et al., "LoRA", arXiv:2106.09685; batching by segments as SGMV in Chen et al., "Punica", arXiv:2310.18547.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraplex_engine.runners.torch.segment import Segment, Term

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.runners.torch.adapter_views import AdapterOp
    from loraplex_engine.runners.torch.divided import Deltas, DividedPairs
    from loraplex_engine.runners.torch.outside import OutsideStep


class LoraStep:
    """Adapters of one step; built once, applied to every fused projection of every layer.

    Args:
        groups: The step's segments; those of a group have the same tokens, and their adapters are added up.
        dtype: The compute dtype.
        divided: What may divide pairs over tensor-parallel ranks; None where each rank computes with a whole factor.

    Attributes:
        outside: Those of the adapters that do something outside of the decoder layers; None if none does.
    """

    outside: OutsideStep | None = None

    def __init__(
        self, groups: Sequence[Sequence[Segment]], dtype: torch.dtype, divided: DividedPairs | None = None
    ) -> None:
        self._groups, self._divided = groups, divided
        self._apply = _apply_fp32 if dtype == torch.float32 else _apply_widened

    @property
    def segments(self) -> list[Segment]:
        """All segments; several may have the same tokens."""
        return [segment for group in self._groups for segment in group]

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, y: Tensor) -> None:
        """Compute a fused projection with the step's adapters.

        Args:
            layer: Decoder layer.
            op: One of the layer's ops.
            linear: The base's product.
            x: Its input, ``[T, in_features]``; the same buffer for this op in every layer.
            y: Its output, ``[T, out_features]``; likewise.
        """
        linear.into(x, y)
        self.apply(layer, op, x, y)

    def apply(self, layer: int, op: str, x: Tensor, y: Tensor) -> None:
        """Add the adapters' pairs to a fused projection; arguments as of `project`."""
        found = [terms for group in self._groups if (terms := terms_of(group, layer, op))]
        self._add_pairs(found, self._deltas(found, x), x, y)

    def _deltas(self, found: Sequence[list[Term]], x: Tensor) -> Deltas | None:
        """Return what pairs make of the step's rows if they are divided over ranks; None if they are not."""
        if self._divided is None:
            return None
        return self._divided.deltas([term for terms in found for term in terms if term.adapter.shrink], x)

    def _add_pairs(self, found: Sequence[list[Term]], deltas: Deltas | None, x: Tensor, y: Tensor) -> None:
        """Add the pairs of adapters that have nothing else in the projection."""
        for terms in found:
            if deltas is None:
                self._apply(terms, x, y)
            else:
                deltas.add_to(terms, y)


def terms_of(group: Sequence[Segment], layer: int, op: str) -> list[Term]:
    """Return what the adapters of a group do in an op of a layer; none for those that do nothing."""
    found = ((segment.table.op(layer, op), segment) for segment in group)
    return [Term(adapter, segment) for adapter, segment in found if adapter is not None]


def _apply_fp32(terms: list[Term], x: Tensor, y: Tensor) -> None:
    """Compute with weights as the left factor: for a few tokens a quarter faster than ``x @ A.T`` in either memory order."""
    for adapter, segment in terms:
        op = adapter.index
        (start, stop, a), *more = adapter.shrink
        shrunk = torch.mm(a, segment.input_of(op, x, start, stop))
        for start, stop, a in more:
            shrunk.addmm_(a, segment.input_of(op, x, start, stop))
        if segment.scales is not None:
            shrunk.mul_(segment.scales)
        parts = torch.split(shrunk, adapter.slice_ranks) if len(adapter.slice_ranks) > 1 else (shrunk,)
        for start, stop, part, b, scaling in adapter.expand:
            segment.output_of(op, y, start, stop).addmm_(b, parts[part], alpha=scaling)


def _apply_widened(terms: list[Term], x: Tensor, y: Tensor) -> None:
    """Compute in fp32 and round once, at the end: the reference of kernels with fp32 accumulators."""
    if len(terms) > 1:
        rows = y[terms[0].segment.tokens]
        total = rows.float()
        for term in terms:
            add_pairs(term, total, x)
        rows.copy_(total)
        return
    ((adapter, segment),) = terms
    parts = shrink(adapter, segment, x)
    for start, stop, part, b, scaling in adapter.expand:
        out = segment.output_of(adapter.index, y, start, stop)
        out.copy_(out.float().addmm_(b.float(), parts[part], alpha=scaling))


def add_pairs(term: Term, total: Tensor, x: Tensor) -> None:
    """Add an adapter's pairs in place to fp32 ``[tokens, out_features]`` of its segment; ``x`` is the whole step's."""
    parts = shrink(term.adapter, term.segment, x)
    for start, stop, part, b, scaling in term.adapter.expand:
        total[:, start:stop].t().addmm_(b.float(), parts[part], alpha=scaling)


def shrink(adapter: AdapterOp, segment: Segment, x: Tensor) -> tuple[Tensor, ...]:
    """Return each slice's ``A x`` times the requests' own factors, fp32 ``[rank, tokens]``, for an adapter with pairs."""
    op = adapter.index
    shrunk = sum(a.float() @ segment.input_of(op, x, start, stop).float() for start, stop, a in adapter.shrink)
    assert isinstance(shrunk, torch.Tensor)
    if segment.scales is not None:
        shrunk.mul_(segment.scales)
    return torch.split(shrunk, adapter.slice_ranks)
