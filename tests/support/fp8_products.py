"""FP8 products of blocks for the CPU, where torch has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loraplex_engine.model.fp8 import Fp8Weight, widen

if TYPE_CHECKING:
    from loraplex_kernels.pointwise.fp8 import Fp8Rows
    from torch import Tensor


def multiply_blocks(rows: Fp8Rows, codes_t: Tensor, scales_t: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """What torch computes on a GPU, as torch has no product with scales of blocks on a CPU."""
    inputs, outputs = codes_t.shape
    assert scales_t.shape[0] % 4 == 0, "columns of scales begin on 16 bytes"
    assert scales_t.stride() == (1, scales_t.shape[0])
    assert rows.scales.t().stride() == (1, len(rows.codes))
    weight = Fp8Weight(codes_t.t(), scales_t.t()[:, : -(-inputs // 128)], is_blocked=True, dtype=torch.float32)
    assert bias is None
    out.copy_(widen(rows.codes, rows.scales.t()) @ weight.rows(0, outputs).t())
