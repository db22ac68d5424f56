"""How large the base's weights are: what an adapter's deltas are compared with in its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from loraplex_common.projections import Split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_common.adapter_image import Geometry
    from loraplex_common.projections import Projection
    from torch import Tensor

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.rank_group import RankGroup

SLICE_ITEMS: Final = 4 << 20
"""Numbers of W that are read at once, for forms of W that have to be unpacked or widened."""


@torch.inference_mode()
def weight_norms(
    geometry: Geometry, linears: Sequence[Mapping[str, Linear]], group: RankGroup | None = None
) -> tuple[float, ...]:
    """Return the Frobenius norms of the base's weights, as products read them; rows are summed up in fp64.

    All weights are read once, before the first step; as with any product, it is the memory that takes the time.

    Args:
        geometry: Says where projections lie in the fused products.
        linears: Per layer, its fused products by op.
        group: The ranks that have a part of the weights each; all call this.

    Returns:
        One norm for each decoder layer and projection, in the order of the geometry's layers.
    """
    found: list[Tensor] = []
    for layer, projections in enumerate(geometry.decoder_layers):
        begins: dict[str, tuple[Linear, int]] = {}
        for name, index in geometry.op_indices(layer).items():
            op, first = geometry.ops[index], 0
            for slice_name, outputs in zip(op.slices, op.local_outputs(geometry.tp_degree), strict=True):
                begins[slice_name] = linears[layer][name], first
                first += outputs
        for each in projections:
            linear, first = begins[each.name]
            found.append(_own_square(linear, each, first, geometry, group))
    if not found:
        return ()
    squares = torch.stack(found)
    if group is not None:
        group.all_reduce(squares)
    return tuple(squares.sqrt().tolist())


def _own_square(
    linear: Linear, projection: Projection, first: int, geometry: Geometry, group: RankGroup | None
) -> Tensor:
    """Return the sum of squares of a projection whose rows begin at ``first``; of rows that several ranks hold, on one of them."""
    if group is None or projection.split is Split.INPUTS:
        return _square(linear, first, first + projection.local_shape(geometry.tp_degree)[1])
    total = torch.zeros((), dtype=torch.float64, device=linear.rows(first, first + 1).device)
    for section in projection.all_sections:
        last = first + section.local_width(group.degree)
        if section.is_first_holder(group.rank, group.degree):
            total += _square(linear, first, last)
        first = last
    return total


def _square(linear: Linear, first: int, last: int) -> Tensor:
    """Return the sum of squares of rows ``[first, last)``, fp64, on the device of W; each row's norm is fp32."""
    step = max(1, SLICE_ITEMS // linear.in_features)
    squares = [
        torch.linalg.vector_norm(linear.rows(begin, min(begin + step, last)).float(), dim=1).double().square().sum()
        for begin in range(first, last, step)
    ]
    return torch.stack(squares).sum()
