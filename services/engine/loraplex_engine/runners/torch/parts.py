"""Steps in which an adapter has parts other than low-rank pairs: factors c and e, a bias b, a sparse delta S, FLoRA.

For a row with such an adapter, in the order of ADR 26:

    y = c * (W (e * x) + pairs(x)) + bias + S x + b

in fp32 behind the base's product, with one rounding at the end. Pairs, S and b of several adapters add up, each times its
request's factor; an adapter with one of the others is always alone. c multiplies the base's bias too where the adapter says so,
and FLoRA takes the place of ``W (e * x)``. Rows of other adapters and of the base are computed as in steps without such
adapters; all rows share the base's product.

Sources: DoRA, arXiv:2402.09353; (IA)3, arXiv:2205.05638; SHiRA, arXiv:2406.13175; FLoRA, arXiv:2312.05677.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraplex_engine.runners.torch.lora import LoraStep, add_pairs, terms_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.runners.torch.adapter_views import FloraSlice, OtherParts, SparseSlice, VectorTile
    from loraplex_engine.runners.torch.divided import DividedPairs
    from loraplex_engine.runners.torch.segment import Segment, Term


def make_lora_step(
    groups: Sequence[Sequence[Segment]], dtype: torch.dtype, divided: DividedPairs | None = None
) -> LoraStep:
    """Return the adapters of one step, as of `LoraStep`; a step of plain LoRA pays nothing for other parts."""
    if any(segment.table.has_other_parts for group in groups for segment in group):
        return PartsStep(groups, dtype, divided)
    return LoraStep(groups, dtype, divided)


class _Work(NamedTuple):
    """Tokens in an op with an adapter that has other parts.

    Attributes:
        terms: The tokens' adapters.
        others: Other parts, with the requests' own factors on them.
        x: The tokens' rows of the op's input.
        y: The tokens' rows of its output.
    """

    terms: list[Term]
    others: list[tuple[OtherParts, Tensor | None]]
    x: Tensor
    y: Tensor


class PartsStep(LoraStep):
    """Adapters of one step, some of which have parts other than pairs."""

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, y: Tensor) -> None:
        """See `LoraStep.project`."""
        plain: list[list[Term]] = []
        works: list[_Work] = []
        for group in self._groups:
            terms = terms_of(group, layer, op)
            others = [(t.adapter.others, t.segment.scales) for t in terms if t.adapter.others is not None]
            if others:
                tokens = group[0].tokens
                works.append(_Work(terms, others, x[tokens], y[tokens]))
            elif terms:
                plain.append(terms)
        deltas = self._deltas([*(work.terms for work in works), *plain], x)
        totals = _products(works, linear, x, y)
        for work, total in zip(works, totals, strict=True):
            for term in work.terms:
                if not term.adapter.shrink:
                    continue
                if deltas is None:
                    add_pairs(term, total, x)
                else:
                    deltas.add(term, total)
            _finish(work, total, linear.bias)
        if linear.bias is not None:
            y.add_(linear.bias)
        self._add_pairs(plain, deltas, x, y)
        for work, total in zip(works, totals, strict=True):
            if total is not work.y:
                work.y.copy_(total)


def _products(works: list[_Work], linear: Linear, x: Tensor, y: Tensor) -> list[Tensor]:
    """Compute the base's product of all rows into ``y``, without its bias.

    Returns:
        For each work, fp32 ``[tokens, out_features]``: its rows' product with e and FLoRA; rows of ``y`` themselves where
        what follows may be computed in place.
    """
    scaled = [(work, work.x.clone()) for work in works if any(others.in_factors for others, _ in work.others)]
    for work, _ in scaled:
        for others, _ in work.others:
            _multiply(work.x, others.in_factors)
    linear.multiply(x, y)
    in_place = y.dtype == torch.float32 and linear.bias is None
    totals = [work.y if in_place else work.y.to(torch.float32, copy=True) for work in works]
    for work, total in zip(works, totals, strict=True):
        for flora in (flora for others, _ in work.others for flora in others.flora.values()):
            total[:, flora.first : flora.last] = _flora_product(flora, linear, work.x)
    for work, unscaled in scaled:
        work.x.copy_(unscaled)
    return totals


def _finish(work: _Work, total: Tensor, bias: Tensor | None) -> None:
    """Apply in place, to product and pairs of some tokens, their adapters' other parts and the base's bias."""
    for others, _ in work.others:
        _multiply(total, others.factors)
    if bias is not None:
        total.add_(bias)
    for others, _ in work.others:
        _multiply(total, others.bias_factors)
    for others, scales in work.others:
        for sparse in others.sparse.values():
            delta = _sparse_product(sparse, work.x)
            if scales is not None:
                delta.mul_(scales)
            total[:, sparse.first : sparse.last].t().add_(delta, alpha=sparse.scaling)
    for others, scales in work.others:
        for start, stop, values in others.biases:
            total[:, start:stop].add_(values if scales is None else torch.outer(scales, values))


def _multiply(rows: Tensor, factors: Iterable[VectorTile]) -> None:
    """Multiply columns of rows in place, in fp32."""
    for start, stop, values in factors:
        columns = rows[:, start:stop]
        if columns.dtype == torch.float32:
            columns.mul_(values)
        else:
            columns.copy_(columns.float().mul_(values))


def _flora_product(flora: FloraSlice, linear: Linear, x: Tensor) -> Tensor:
    """Return ``sum over r of B_r * (W (A_r * x))``, fp32 ``[tokens, outputs]``; each pass is rounded as the base's product is."""
    weight = linear.rows(flora.first, flora.last).t()
    b = torch.cat([tile.values for tile in flora.b], dim=1)
    total = torch.zeros((len(x), flora.last - flora.first), device=x.device)
    scaled = torch.empty_like(x)
    for rank in range(flora.rank):
        for start, stop, a in flora.a:
            scaled[:, start:stop] = x[:, start:stop].float() * a[rank]
        total.addcmul_((scaled @ weight).float(), b[rank])
    return total


def _sparse_product(sparse: SparseSlice, x: Tensor) -> Tensor:
    """Return ``S x``, fp32 ``[outputs, tokens]``: each output's bag of columns of ``x``, weighted by its values."""
    columns = torch.cat([piece.to(torch.int32) for piece in sparse.columns])
    values, begins = torch.cat(sparse.values).float(), torch.cat(sparse.begins)
    table = x.float().t().contiguous()
    return F.embedding_bag(columns, table, begins, mode="sum", per_sample_weights=values, include_last_offset=True)
