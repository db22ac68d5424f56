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
    """

    def __init__(self, library: KernelLibrary, cut: Cut, *, has_groups: bool) -> None:
        self._library, self.cut, self._has_groups = library, cut, has_groups
        self._kernel = library.load(
            "fp8_product",
            Fp8ProductParams(),
            cut.threads,
            defines=cut.defines(has_groups=has_groups),
            shared_bytes=cut.shared_bytes,
        )

    def weight_map(self, codes: torch.Tensor) -> TensorMap:
        """Return the map of a weight, e4m3 ``[outputs, inputs]``; kernels of as many outputs to a cluster take the same one."""
        return byte_map(codes, self.cut.outputs)

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
    ) -> None:
        """Compute the rows of ``y``, ``[rows, outputs]``.

        Args:
            x: From `input_map`.
            x_scales: fp32 ``[1, rows or more]``; of groups ``[ceil(inputs / 128), rows or more]``, a multiple of 4 rows.
            weight: From `weight_map`.
            weight_scales: fp32 ``[outputs]``; of groups ``[ceil(outputs / 128), ceil(inputs / 128)]``.
            y: bf16.
            inputs: Width of the input.
            bias: ``[outputs]``; added.
            accumulates: Whether ``y`` is added to.

        Raises:
            ValueError: If a shape, dtype or device differs, or there are more rows than the kernel computes.
        """
        check, params, (rows, outputs) = self._library.check, self._kernel.params, y.shape
        steps = -(-inputs // STEP)
        if rows > self.cut.rows:
            raise ValueError(f"{rows} rows in a kernel of {self.cut.rows}")
        params.weight, params.x = weight, x
        if self._has_groups:
            params.weight_scales = check("weight_scales", weight_scales, torch.float32, -(-outputs // 128), steps)
            params.x_scales = check("x_scales", x_scales, torch.float32, steps, -1)
        else:
            params.weight_scales = check("weight_scales", weight_scales, torch.float32, outputs)
            params.x_scales = check("x_scales", x_scales, torch.float32, 1, -1)
        params.bias = None if bias is None else check("bias", bias, self._library.dtype, outputs)
        params.y = check("y", y, self._library.dtype, rows, outputs)
        params.rows, params.outputs, params.steps = rows, outputs, steps
        params.x_scale_stride, params.accumulates = x_scales.shape[1], accumulates
        self._kernel.launch(-(-outputs // self.cut.outputs) * self.cut.cluster)
