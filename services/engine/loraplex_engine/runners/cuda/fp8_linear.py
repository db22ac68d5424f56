"""Linear layers of a weight in e4m3 on the CUDA backend: our products of few rows, torch's scaled products of more.

cuBLAS has no scaled product that accumulates onto its output through torch, so `ScaledMmLinear.onto` adds a product that lies in
a buffer; decoders have the followers of products add where they can (ADR 35).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import torch
from torch.nn.functional import ScalingType

from loraplex_engine.model.linear import LinearForms
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.runners.cuda.few_row_dense import DenseProducts, FewRowDense
from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_common.decoder_config import ModelConfig
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.pointwise.fp8 import Fp8Rows
    from torch import Tensor

    from loraplex_engine.model.fp8 import Fp8Weight
    from loraplex_engine.model.linear import Linear

FAST_ACCUMULATION: Final = True
"""Whether tensor cores keep torch's sums, in fewer bits than fp32 has, where scales are of rows and outputs (ADR 35)."""
BLOCK_RECIPES: Final = ([ScalingType.BlockWise1x128.value], [ScalingType.BlockWise128x128.value])
SCALE_STEP: Final = 4
"""Scales of a block of outputs begin on 16 bytes."""


class ScaledMmLinear:
    """A `Linear` of a weight in e4m3: one launch a product, behind a kernel that quantises its input unless that is done.

    Products of few rows are our kernel's on sm_90a, as many rows as it is faster for; all others are cuBLAS calls (ADR 46).

    Args:
        inputs: Where inputs lie in e4m3.
        weight: Its numbers and scales.
        bias: ``[out_features]`` or None.
    """

    def __init__(self, inputs: Fp8Inputs, weight: Fp8Weight, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._inputs = inputs
        self._codes_t = weight.codes.t()
        self._scales_t = _padded_blocks(weight.scales).t() if weight.is_blocked else weight.scales.view(1, -1)
        self._few_rows = inputs.few_rows.of(weight)
        inputs.require(weight.in_features, has_groups=weight.is_blocked)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.out_features

    @property
    def weight_bytes(self) -> int:
        """See `Linear`."""
        return self.weight.nbytes

    def rows(self, first: int, last: int) -> Tensor:
        """See `Linear`: unpacked."""
        return self.weight.rows(first, last).to(self.weight.dtype)

    def multiply(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; ``out`` lies in memory that has room for `padded_rows`, which no one else uses meanwhile."""
        self._product(self._inputs.of(x, has_groups=self.weight.is_blocked), out, None)

    def into(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; ``out`` as of `multiply`."""
        self._product(self._inputs.of(x, has_groups=self.weight.is_blocked), out, self.bias)

    def onto(self, x: Tensor, out: Tensor) -> None:
        """See `Linear`; more than few rows some at a time, rounded before they are added."""
        if self._few_rows is not None and len(x) <= self._few_rows.max_rows:
            rows = self._inputs.of(x, has_groups=self.weight.is_blocked)
            self._few_rows.launch(rows, out, bias=self.bias, accumulates=True)
            return
        step = self._inputs.sum_rows
        for first in range(0, len(x), step):
            some = x[first : first + step]
            product = self._inputs.product(len(some), self.out_features)
            self.into(some, product)
            out[first : first + step].add_(product)

    def _product(self, rows: Fp8Rows, out: Tensor, bias: Tensor | None) -> None:
        if self._few_rows is not None and len(out) <= self._few_rows.max_rows:
            self._few_rows.launch(rows, out, bias=bias)
            return
        padded = rows.codes.shape[0]
        if padded != len(out):
            out = out.as_strided((padded, self.out_features), (self.out_features, 1))
        multiply = _multiply_blocks if self.weight.is_blocked else _multiply_rows
        multiply(rows, self._codes_t, self._scales_t, bias, out)


def _padded_blocks(scales: Tensor) -> Tensor:
    """Return the scales of blocks with as many for each block of outputs as cuBLAS wants."""
    return torch.nn.functional.pad(scales, (0, -scales.shape[1] % SCALE_STEP)).contiguous()


def _multiply_rows(
    rows: Fp8Rows,
    codes_t: Tensor,
    scales_t: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    is_fast: bool = FAST_ACCUMULATION,
) -> None:
    """Compute ``out`` with a scale for each token and each output.

    Args:
        rows: The input.
        codes_t: The weight, ``[inputs, outputs]``, inputs next to each other in memory.
        scales_t: fp32 ``[1, outputs]``.
        bias: ``[outputs]`` or None.
        out: ``[rows, outputs]``, contiguous.
        is_fast: Whether sums stay in tensor cores, see `FAST_ACCUMULATION`.
    """
    torch._scaled_mm(
        rows.codes,
        codes_t,
        scale_a=rows.scales.view(-1, 1),
        scale_b=scales_t,
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=is_fast,
        out=out,
    )


def _multiply_blocks(
    rows: Fp8Rows,
    codes_t: Tensor,
    scales_t: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Compute ``out`` with a scale for each 128 inputs of a token and for each block of 128 outputs and 128 inputs.

    Sums are in fp32. Arguments as of `_multiply_rows`, but ``scales_t`` is ``[blocks of inputs, blocks of outputs]``.
    """
    of_tokens, of_blocks = BLOCK_RECIPES
    torch._scaled_mm_v2(
        rows.codes,
        codes_t,
        [rows.scales.t()],
        of_tokens,
        [],
        [scales_t],
        of_blocks,
        [],
        bias,
        out.dtype,
        (),
        False,  # torch refuses fast sums of blocks
        out=out,
    )


def read_codes_alone(linears: Iterable[Linear], inputs: Fp8Inputs) -> bool:
    """Tell whether linear layers read nothing of an input but the e4m3 form that fused kernels write: of one kind of scales."""
    return all(isinstance(each, ScaledMmLinear) and each.weight.is_blocked == inputs.has_groups for each in linears)


def linear_forms(
    form: WeightForm, library: KernelLibrary, config: ModelConfig, *, max_tokens: int
) -> tuple[LinearForms, Fp8Inputs | None]:
    """Return the linear layers of an engine, and where inputs of those in FP8 lie; None if weights are whole."""
    dense = partial(FewRowDense, DenseProducts(library))
    if form is not WeightForm.FP8:
        return LinearForms(dense=dense), None
    inputs = Fp8Inputs(library, config, max_tokens=max_tokens)
    return LinearForms(dense=dense, fp8=partial(ScaledMmLinear, inputs)), inputs
