"""FP8 products of few rows by our kernel, where it exists: torch's take twice as long as the weights take to be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from loraplex_kernels.pointwise.fp8 import GROUP
from loraplex_kernels.products import fp8_cut
from loraplex_kernels.products.fp8_product import Fp8Product

if TYPE_CHECKING:
    from loraplex_kernels.fp8_params import TensorMap
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.pointwise.fp8 import Fp8Rows
    from loraplex_kernels.products.fp8_cut import Cut
    from torch import Tensor

    from loraplex_engine.model.fp8 import Fp8Weight

ARCH: Final = "sm_90a"
INPUT_STEP: Final = 16
OUTPUT_STEP: Final = 8
Gate = tuple[str, ...] | None
"""Macros of the gate that a product's kernel computes; None if it computes none."""


class FewRowProducts:
    """The kernels that linear layers share, and the maps of their inputs.

    Args:
        library: Kernels.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._kernels: dict[tuple[Cut, bool, Gate], Fp8Product] = {}
        self._maps: dict[tuple[int, int, int, int], TensorMap] = {}

    def of(self, weight: Fp8Weight) -> FewRowProduct | None:
        """Return a weight's products, compiled; None if there are none: torch's have to do."""
        is_bf16 = self._library.dtype == weight.dtype == torch.bfloat16
        fits = weight.in_features % INPUT_STEP == weight.out_features % OUTPUT_STEP == 0
        if self._library.arch != ARCH or not is_bf16 or not fits:
            return None
        return self._product(weight, self._cuts(weight), None)

    def gated(self, weight: Fp8Weight, gate: tuple[str, ...]) -> FewRowProduct | None:
        """Return products that compute a gate of gate_up's, compiled; None if there are none.

        Args:
            weight: Gate's over up's.
            gate: The gate's macros.
        """
        step = GROUP if weight.is_blocked else OUTPUT_STEP  # up's blocks begin with its first output
        cuts = self._cuts(weight)
        if self.of(weight) is None or weight.out_features % (2 * step) or not all(cut.can_gate for cut in cuts):
            return None
        return self._product(weight, cuts, gate)

    def _cuts(self, weight: Fp8Weight) -> tuple[Cut, ...]:
        return fp8_cut.choose_cuts(weight.out_features, self._library.num_multiprocessors)

    def _product(self, weight: Fp8Weight, cuts: tuple[Cut, ...], gate: Gate) -> FewRowProduct:
        return FewRowProduct(self, weight, tuple(self._kernel(cut, weight.is_blocked, gate) for cut in cuts))

    def _kernel(self, *key: *tuple[Cut, bool, Gate]) -> Fp8Product:
        if key not in self._kernels:
            cut, has_groups, gate = key
            self._kernels[key] = Fp8Product(self._library, cut, has_groups=has_groups, gate=gate)
        return self._kernels[key]

    def input_map(self, kernel: Fp8Product, codes: Tensor) -> TensorMap:
        """Return the map of inputs, e4m3 ``[rows, inputs]``; there is one for each place, shape and kind of kernel."""
        key = codes.data_ptr(), *codes.shape, kernel.cut.rows
        if key not in self._maps:
            self._maps[key] = kernel.input_map(codes)
        return self._maps[key]


class _Kernel(NamedTuple):
    """A kernel, and the map of the weight in its boxes."""

    product: Fp8Product
    weight: TensorMap


class FewRowProduct:
    """Products of few rows with one weight.

    Args:
        products: What they share with others'.
        weight: Its numbers and scales, which stay where they are.
        kernels: By rising rows.

    Attributes:
        max_rows: Most rows.
        columns: Columns of the output of which a gate's kernel says the largest value.
    """

    def __init__(self, products: FewRowProducts, weight: Fp8Weight, kernels: tuple[Fp8Product, ...]) -> None:
        self._products, self._in_features = products, weight.in_features
        self._scales = weight.scales.contiguous() if weight.is_blocked else weight.scales.reshape(-1)
        maps = {each.columns: each.weight_map(weight.codes) for each in kernels}
        self._kernels = [_Kernel(each, maps[each.columns]) for each in kernels]
        self.max_rows, self.columns = kernels[-1].cut.rows, kernels[-1].columns

    def launch(
        self,
        rows: Fp8Rows,
        y: Tensor,
        *,
        bias: Tensor | None,
        accumulates: bool = False,
        maxima: Tensor | None = None,
    ) -> None:
        """Compute ``y``, at most `max_rows` rows, or add to it.

        Args:
            rows: The input, of as many rows or more.
            y: bf16 ``[rows, out_features]``; no others are written.
            bias: ``[out_features]`` or None.
            accumulates: Whether ``y`` is added to.
            maxima: Where a gate's kernel writes the largest values, see `Fp8Product.launch`.
        """
        kernel = next(each for each in self._kernels if len(y) <= each.product.cut.rows)
        kernel.product.launch(
            self._products.input_map(kernel.product, rows.codes),
            rows.scales,
            kernel.weight,
            self._scales,
            y,
            inputs=self._in_features,
            bias=bias,
            accumulates=accumulates,
            maxima=maxima,
        )
