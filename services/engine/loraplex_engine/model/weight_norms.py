"""How large the base's weights are: what an adapter's deltas are compared with in its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_common.adapter_image import Geometry
    from torch import Tensor

    from loraplex_engine.model.linear import Linear

SLICE_ITEMS: Final = 4 << 20
"""Numbers of W that are read at once, for forms of W that have to be unpacked or widened."""


@torch.inference_mode()
def weight_norms(geometry: Geometry, linears: Sequence[Mapping[str, Linear]]) -> tuple[float, ...]:
    """Return the Frobenius norms of the base's weights, as products read them; rows are summed up in fp64.

    All weights are read once, before the first step; as with any product, it is the memory that takes the time.

    Args:
        geometry: Says where projections lie in the fused products.
        linears: Per layer, its fused products by op.

    Returns:
        One norm for each decoder layer and projection, in the order of the geometry's layers.
    """
    found: list[Tensor] = []
    for layer, projections in enumerate(geometry.decoder_layers):
        bounds: dict[str, tuple[Linear, int, int]] = {}
        for name, index in geometry.op_indices(layer).items():
            op, first = geometry.ops[index], 0
            for each, outputs in zip(op.slices, op.local_outputs(geometry.tp_degree), strict=True):
                bounds[each] = linears[layer][name], first, first + outputs
                first += outputs
        found += [_square(*bounds[each.name]) for each in projections]
    return tuple(torch.stack(found).sqrt().tolist()) if found else ()


def _square(linear: Linear, first: int, last: int) -> Tensor:
    """Return the sum of squares of rows ``[first, last)``, fp64, on the device of W; each row's norm is fp32."""
    step = max(1, SLICE_ITEMS // linear.in_features)
    squares = [
        torch.linalg.vector_norm(linear.rows(begin, min(begin + step, last)).float(), dim=1).double().square().sum()
        for begin in range(first, last, step)
    ]
    return torch.stack(squares).sum()
