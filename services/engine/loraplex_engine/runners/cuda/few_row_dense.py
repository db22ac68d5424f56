"""Dense products of few rows by our kernel, where it exists: a step's weights are on their way before its inputs are there (ADR 57)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from loraplex_kernels.products import fp8_cut
from loraplex_kernels.products.dense_product import DenseProduct

from loraplex_engine.runners.cuda.linears import CublasDense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_kernels.fp8_params import TensorMap
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.products.fp8_cut import Cut
    from torch import Tensor

    from loraplex_engine.model.linear import Linear

ARCH: Final = "sm_90a"
STEP: Final = 8
"""What inputs and outputs are a multiple of: rows start on 16 bytes."""
MAX_OUTPUTS: Final = 1 << 16
"""Outputs of the widest product of a layer; lm_head's are more, and its time is cuBLAS's own."""
MAX_MAPS: Final = 4096
"""Maps of inputs that are kept: a step has a few for each number of rows."""


class _Kernel(NamedTuple):
    """A kernel, and the map of the weight in its boxes."""

    product: DenseProduct
    weight: TensorMap


class DenseProducts:
    """The kernels that linear layers share, and the maps of their inputs.

    Args:
        library: Kernels.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._kernels: dict[tuple[Cut, tuple[str, ...] | None], DenseProduct] = {}
        self._maps: dict[tuple[int, int, int, int], TensorMap] = {}

    def of(self, weight: Tensor, gate: tuple[str, ...] | None = None) -> DenseRows | None:
        """Return a weight's products, compiled; None if there are none: cuBLAS's have to do.

        Args:
            weight: ``[outputs, inputs]``; a gate's lies over up's.
            gate: The gate's macros, if the kernel is to compute it.
        """
        outputs, inputs = weight.shape
        is_bf16 = self._library.dtype == weight.dtype == torch.bfloat16
        fits = inputs % STEP == 0 and outputs % (STEP if gate is None else 2 * STEP) == 0 and outputs <= MAX_OUTPUTS
        if self._library.arch != ARCH or not (is_bf16 and fits and weight.is_contiguous()):
            return None
        cuts = fp8_cut.dense_cuts(outputs, self._library.num_multiprocessors)
        if gate is not None and not all(cut.can_gate for cut in cuts):
            return None
        return DenseRows(self, weight, [self._kernel(cut, gate) for cut in cuts])

    def _kernel(self, cut: Cut, gate: tuple[str, ...] | None) -> DenseProduct:
        if (cut, gate) not in self._kernels:
            self._kernels[cut, gate] = DenseProduct(self._library, cut, gate=gate)
        return self._kernels[cut, gate]

    def input_map(self, kernel: DenseProduct, x: Tensor) -> TensorMap:
        """Return the map of inputs, bf16 ``[rows, inputs]``; there is one for each place, shape and kind of kernel."""
        key = x.data_ptr(), *x.shape, kernel.cut.rows
        if key not in self._maps:
            if len(self._maps) == MAX_MAPS:
                self._maps.clear()  # inputs in memory of torch's own are anywhere
            self._maps[key] = kernel.input_map(x)
        return self._maps[key]


class DenseRows:
    """Products of few rows with one weight.

    Args:
        products: What they share with others'.
        weight: bf16 ``[outputs, inputs]``, which stays where it is.
        kernels: By rising rows.

    Attributes:
        max_rows: Most rows.
    """

    def __init__(self, products: DenseProducts, weight: Tensor, kernels: Sequence[DenseProduct]) -> None:
        self._products, self._inputs = products, weight.shape[1]
        maps = {each.columns: each.weight_map(weight) for each in kernels}
        self._kernels = [_Kernel(each, maps[each.columns]) for each in kernels]
        self.max_rows = kernels[-1].cut.rows

    def launch(self, x: Tensor, y: Tensor, *, bias: Tensor | None, accumulates: bool = False) -> bool:
        """Compute ``y``, or add to it, unless rows are too many or not next to each other: then nothing is done.

        Args:
            x: bf16 ``[rows, inputs]``.
            y: bf16 ``[rows, outputs]``; of a gate's kernel half of the weight's outputs.
            bias: ``[outputs of the weight]`` or None.
            accumulates: Whether ``y`` is added to.

        Returns:
            Whether it was computed.
        """
        if not 0 < len(x) <= self.max_rows or not x.is_contiguous() or not y.is_contiguous():
            return False
        kernel = next(each for each in self._kernels if len(x) <= each.product.cut.rows)
        of_input = self._products.input_map(kernel.product, x)
        kernel.product.launch(of_input, kernel.weight, y, inputs=self._inputs, bias=bias, accumulates=accumulates)
        return True


class FewRowDense(CublasDense):
    """`CublasDense`, few rows by our kernel.

    Args:
        products: Kernels.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]`` or None.

    Attributes:
        few_rows: Our products; None if there is no kernel.
    """

    def __init__(self, products: DenseProducts, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self.products = products
        self.few_rows = products.of(weight)

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`."""
        if self.few_rows is None or not self.few_rows.launch(x, out, bias=None):
            super().multiply(x, out)

    def into(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`."""
        if self.few_rows is None or not self.few_rows.launch(x, out, bias=self.bias):
            super().into(x, out)

    def onto(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`."""
        if self.few_rows is None or not self.few_rows.launch(x, out, bias=self.bias, accumulates=True):
            super().onto(x, out)


class DenseGateProducts:
    """gate_up's dense products of few rows with the gate in them; bit by bit as apart.

    Args:
        linears: gate_up of each layer.
        gate: The gate's macros, `SiluMul.macros`.
    """

    def __init__(self, linears: Sequence[Linear], gate: tuple[str, ...]) -> None:
        self._products = [
            each.products.of(each.weight, gate) if isinstance(each, FewRowDense) else None for each in linears
        ]

    def launch(self, layer: int, linear: Linear, x: Tensor, gate_up: Tensor, out: Tensor) -> bool:
        """Compute ``out = silu(gate) * up`` of a layer's gate_up; arguments as of `GateProducts.launch`.

        Returns:
            Whether it was computed.
        """
        del gate_up
        product = self._products[layer]
        return product is not None and product.launch(x, out, bias=linear.bias)
