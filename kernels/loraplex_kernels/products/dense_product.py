"""Products of few rows with weights in bf16 (sm_90a): as long as the weights take to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraplex_kernels.fp8_params import Fp8ProductParams
from loraplex_kernels.products.fp8_cut import DENSE_MACRO, STEP
from loraplex_kernels.products.tensor_map import byte_map

if TYPE_CHECKING:
    from loraplex_kernels.fp8_params import TensorMap
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.products.fp8_cut import Cut

STEP_INPUTS = STEP // 2
"""Inputs of a step of the ring."""


class DenseProduct:
    """``y = x @ W.T`` in bf16, cut one way: fp8_product.cu without scales.

    Args:
        library: Kernels in bf16, of sm_90a.
        cut: How products are cut.
        gate: Macros of the gate that the kernel computes of the product (`SiluMul.macros`); the weight is then gate's and up's, one
            over the other. None for a plain product.

    Attributes:
        columns: Columns of ``y`` of a cluster, and the weight's rows of a box.

    Raises:
        ValueError: The cut has no warpgroups for gate and up.
    """

    def __init__(self, library: KernelLibrary, cut: Cut, *, gate: tuple[str, ...] | None = None) -> None:
        if gate is not None and not cut.can_gate:
            raise ValueError(f"{cut.warpgroups} warpgroups cannot compute gate and up")
        self._library, self.cut = library, cut
        self._sides = 1 if gate is None else 2
        self.columns = cut.outputs // self._sides
        self._kernel = library.load(
            "fp8_product",
            Fp8ProductParams(),
            cut.threads,
            defines=(DENSE_MACRO, *cut.defines(has_groups=False, gate=gate)),
            shared_bytes=cut.shared_bytes,
        )

    def weight_map(self, weight: torch.Tensor) -> TensorMap:
        """Return the map of a weight, bf16 ``[outputs, inputs]``; kernels of as many `columns` take the same one."""
        return byte_map(weight.view(torch.uint8), self.columns)

    def input_map(self, x: torch.Tensor) -> TensorMap:
        """Return the map of inputs, bf16 ``[rows, inputs]``."""
        return byte_map(x.view(torch.uint8), self.cut.rows)

    def launch(
        self,
        x: TensorMap,
        weight: TensorMap,
        y: torch.Tensor,
        *,
        inputs: int,
        bias: torch.Tensor | None = None,
        accumulates: bool = False,
    ) -> None:
        """Compute the rows of ``y``, ``[rows, outputs]``; of a gate's kernel, whose weight has twice as many, `SiluMul` of the product.

        Args:
            x: From `input_map`.
            weight: From `weight_map`.
            y: bf16.
            inputs: Width of the input.
            bias: ``[outputs]``; added.
            accumulates: Whether ``y`` is added to; not by a gate's kernel.

        Raises:
            ValueError: If a shape, dtype or device differs, or there are more rows than the kernel computes.
        """
        check, params, (rows, outputs) = self._library.check, self._kernel.params, y.shape
        if rows > self.cut.rows:
            raise ValueError(f"{rows} rows in a kernel of {self.cut.rows}")
        if accumulates and self._sides > 1:
            raise ValueError("a gate's product is not added to anything")
        params.weight, params.x = weight, x
        params.bias = None if bias is None else check("bias", bias, torch.bfloat16, self._sides * outputs)
        params.y = check("y", y, torch.bfloat16, rows, outputs)
        params.rows, params.outputs, params.steps = rows, outputs, -(-inputs // STEP_INPUTS)
        params.accumulates = accumulates
        self._kernel.launch(-(-outputs // self.columns) * self.cut.cluster)
