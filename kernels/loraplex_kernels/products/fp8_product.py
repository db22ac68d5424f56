"""Products of few rows with weights in e4m3 (sm_90a): as long as the weights take to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraplex_kernels.fp8_params import Fp8ProductParams
from loraplex_kernels.products.fp8_cut import STEP
from loraplex_kernels.products.tensor_map import byte_map

if TYPE_CHECKING:
    from loraplex_kernels.fp8_params import TensorMap
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.products.fp8_cut import Cut


class Fp8Product:
    """``y = x @ W.T`` of e4m3 numbers and their scales, cut one way.

    Args:
        library: Kernels in bf16, of sm_90a.
        cut: How products are cut.
        has_groups: Whether each 128 inputs of a row, and each 128 x 128 numbers of a weight, have a scale, and not each row and
            each output.
        gate: Macros of the gate that the kernel computes of the product (`SiluMul.macros`); the weight is then gate's and up's, one
            over the other. None for a plain product.

    Attributes:
        columns: Columns of ``y`` of a cluster, and the weight's rows of a box.

    Raises:
        ValueError: The cut has no warpgroups for gate and up.
    """

    def __init__(
        self, library: KernelLibrary, cut: Cut, *, has_groups: bool, gate: tuple[str, ...] | None = None
    ) -> None:
        if gate is not None and not cut.can_gate:
            raise ValueError(f"{cut.warpgroups} warpgroups cannot compute gate and up")
        self._library, self.cut, self._has_groups = library, cut, has_groups
        self._sides = 1 if gate is None else 2
        self.columns = cut.outputs // self._sides
        self._kernel = library.load(
            "fp8_product",
            Fp8ProductParams(),
            cut.threads,
            defines=cut.defines(has_groups=has_groups, gate=gate),
            shared_bytes=cut.shared_bytes,
        )

    def weight_map(self, codes: torch.Tensor) -> TensorMap:
        """Return the map of a weight, e4m3 ``[outputs, inputs]``; kernels of as many `columns` take the same one."""
        return byte_map(codes, self.columns)

    def input_map(self, codes: torch.Tensor) -> TensorMap:
        """Return the map of inputs, e4m3 ``[rows, inputs]``."""
        return byte_map(codes, self.cut.rows)

    def launch(
        self,
        x: TensorMap,
        x_scales: torch.Tensor,
        weight: TensorMap,
        weight_scales: torch.Tensor,
        y: torch.Tensor,
        *,
        inputs: int,
        bias: torch.Tensor | None = None,
        accumulates: bool = False,
        maxima: torch.Tensor | None = None,
    ) -> None:
        """Compute the rows of ``y``, ``[rows, outputs]``; of a gate's kernel, whose weight has twice as many, `SiluMul` of the product.

        Args:
            x: From `input_map`.
            x_scales: fp32 ``[1, rows or more]``; of groups ``[ceil(inputs / 128), rows or more]``, a multiple of 4 rows.
            weight: From `weight_map`.
            weight_scales: fp32 ``[outputs]``; of groups ``[ceil(outputs / 128), ceil(inputs / 128)]``.
            y: bf16.
            inputs: Width of the input.
            bias: ``[outputs]``; added.
            accumulates: Whether ``y`` is added to; not by a gate's kernel.
            maxima: fp32 ``[rows or more, ceil(outputs / columns)]``; a gate's kernel without groups writes the largest absolute value of
                each row's columns there.

        Raises:
            ValueError: If a shape, dtype or device differs, or there are more rows than the kernel computes.
        """
        check, params, (rows, outputs) = self._library.check, self._kernel.params, y.shape
        steps, weight_rows = -(-inputs // STEP), self._sides * outputs
        if rows > self.cut.rows:
            raise ValueError(f"{rows} rows in a kernel of {self.cut.rows}")
        if accumulates and self._sides > 1:
            raise ValueError("a gate's product is not added to anything")
        params.weight, params.x = weight, x
        if self._has_groups:
            params.weight_scales = check("weight_scales", weight_scales, torch.float32, -(-weight_rows // 128), steps)
            params.x_scales = check("x_scales", x_scales, torch.float32, steps, -1)
        else:
            params.weight_scales = check("weight_scales", weight_scales, torch.float32, weight_rows)
            params.x_scales = check("x_scales", x_scales, torch.float32, 1, -1)
        params.bias = None if bias is None else check("bias", bias, self._library.dtype, weight_rows)
        params.maxima = self._maxima(maxima, rows, outputs)
        params.y = check("y", y, self._library.dtype, rows, outputs)
        params.rows, params.outputs, params.steps = rows, outputs, steps
        params.x_scale_stride, params.accumulates = x_scales.shape[1], accumulates
        self._kernel.launch(-(-outputs // self.columns) * self.cut.cluster)

    def _maxima(self, maxima: torch.Tensor | None, rows: int, outputs: int) -> int | None:
        """Return where a gate's kernel writes its rows' largest values; None if it does not."""
        if maxima is None:
            if self._sides > 1 and not self._has_groups:
                raise ValueError("a gate's kernel without groups writes maxima")
            return None
        if maxima.shape[0] < rows:
            raise ValueError(f"maxima of {maxima.shape[0]} rows, not of {rows}")
        return self._library.check("maxima", maxima, torch.float32, -1, -(-outputs // self.columns))
