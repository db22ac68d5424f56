"""Inputs of FP8 products in e4m3, and the kernels that write them: fused with the norm and SiLU before a product, or alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from loraplex_kernels.pointwise.fp8 import GROUP, Fp8Rows, QuantiseFp8, RmsNormFp8, SiluMulFp8
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from loraplex_kernels.pointwise.silu_mul import SiluMul

from loraplex_engine.runners.cuda.fp8_few_rows import FewRowProducts

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig
    from loraplex_kernels.module import KernelLibrary
    from torch import Tensor

ROW_STEP: Final = 8
"""Products take a multiple of these rows: cuBLAS wants columns of scales on 16 bytes, and multiplies one row no faster than eight."""
SUM_ROWS: Final = 1024
"""Rows whose product is held at once where it is added to something."""


def padded_rows(count: int) -> int:
    """Return how many rows a product of ``count`` rows computes, and its output needs room for."""
    return -(-count // ROW_STEP) * ROW_STEP


class Fp8Inputs:
    """Activations in e4m3 between the kernel that quantises them and the product that reads them.

    One buffer does for all: a product is launched before the next input is quantised. A kernel that computes an input may write
    its e4m3 form, too (`to_write`); the product finds it (`of`) unless another input was written meanwhile, or this one was
    changed (`forget`), and quantises it otherwise. An input that nothing but products reads is written in e4m3 alone: what
    stands for it (`without_memory`) has a shape and no numbers, so that whatever would read these fails when it is launched.

    Args:
        library: Kernels.
        config: The decoder, whose linear layers multiply.
        max_tokens: Tokens of the largest step.

    Attributes:
        has_groups: Whether fused kernels write a scale for each 128 features, and not for each token; as the linear layers want.
        few_rows: Kernels of products of few rows.
    """

    def __init__(self, library: KernelLibrary, config: ModelConfig, *, max_tokens: int) -> None:
        self.library, self.has_groups, self.few_rows = library, False, FewRowProducts(library)
        projections = [each for layer in config.layers for each in layer]
        width = max(each.in_features for each in projections)
        self._max_rows, device = padded_rows(max_tokens), library.device
        self._codes = torch.zeros(self._max_rows * width, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        self._scales = torch.zeros(self._max_rows * -(-width // GROUP), dtype=torch.float32, device=device)
        widest = max(
            sum(each.out_features for each in layer if each.op == op) for layer in config.layers for op in _ops(config)
        )
        self._sum_rows = min(self._max_rows, SUM_ROWS)
        self._products = torch.zeros(self._sum_rows * widest, dtype=library.dtype, device=device)
        self._kernels: dict[tuple[int, bool], QuantiseFp8] = {}
        self._views: dict[tuple[int, int, bool], Fp8Rows] = {}
        self._written: tuple[Tensor, bool] | None = (
            None  # the input that the buffer holds, and whether with several scales
        )

    @property
    def fixed_tensors(self) -> tuple[Tensor, ...]:
        """Tensors whose addresses reach kernels."""
        return self._codes, self._scales, self._products

    @property
    def sum_rows(self) -> int:
        """Most rows of `product`."""
        return self._sum_rows

    def require(self, width: int, *, has_groups: bool) -> None:
        """Compile what quantises inputs of a linear layer."""
        self.has_groups = self.has_groups or has_groups
        if (width, has_groups) not in self._kernels:
            self._kernels[width, has_groups] = QuantiseFp8(self.library, width, has_groups=has_groups)

    @staticmethod
    def without_memory(x: Tensor) -> Tensor:
        """Return what stands for an input of the shape of ``x`` that is written in e4m3 alone."""
        return torch.empty_like(x, device="meta")

    def to_write(self, x: Tensor) -> Fp8Rows:
        """Return where the kernel that computes ``x`` writes its e4m3 form."""
        self._written = x, self.has_groups
        return self._rows(len(x), x.shape[1], has_groups=self.has_groups)

    def forget(self, x: Tensor) -> None:
        """Say that ``x`` was changed since its e4m3 form was written."""
        if self._written is not None and _is_at(self._written[0], x):
            self._written = None

    def of(self, x: Tensor, *, has_groups: bool) -> Fp8Rows:
        """Return ``x`` in e4m3, with the rows that a product needs beyond; launches a kernel unless it is written.

        Raises:
            RuntimeError: If ``x`` has no memory and the buffer does not hold it: it was read before, or is of other scales.
        """
        rows = self._rows(len(x), x.shape[1], has_groups=has_groups)
        written, self._written = self._written, None  # each is read once; what writes an input next need not say so
        if written is not None and written[1] == has_groups and len(written[0]) == len(x) and _is_at(written[0], x):
            return rows
        if x.is_meta:
            raise RuntimeError(
                f"an input of {list(x.shape)} that was written in e4m3 alone is not there to be quantised"
            )
        self._kernels[x.shape[1], has_groups].launch(x, rows)
        return rows

    def product(self, count: int, outputs: int) -> Tensor:
        """Return room for a product of up to `sum_rows` rows that is added to something, ``[count, outputs]``."""
        return self._products[: count * outputs].view(count, outputs)

    def _rows(self, count: int, width: int, *, has_groups: bool) -> Fp8Rows:
        padded = padded_rows(count)
        key = padded, width, has_groups
        if key not in self._views:
            groups = -(-width // GROUP) if has_groups else 1
            self._views[key] = Fp8Rows(
                self._codes[: padded * width].view(padded, width), self._scales[: padded * groups].view(groups, padded)
            )
        return self._views[key]


def _is_at(written: Tensor, x: Tensor) -> bool:
    """Tell whether two inputs begin at one address; without memory, whether they are one."""
    return written is x if written.is_meta else written.data_ptr() == x.data_ptr()


def _memory_of(x: Tensor) -> Tensor | None:
    """Return where a kernel writes an input besides its e4m3 form; None if nowhere."""
    return None if x.is_meta else x


def _ops(config: ModelConfig) -> set[str]:
    return {each.op for layer in config.layers for each in layer}


class QuantisingNorm(RmsNorm):
    """`RmsNorm` that also writes its result in e4m3, alone if ``out`` has no memory, but for chosen rows: these are lm_head's."""

    def __init__(
        self, library: KernelLibrary, hidden_size: int, eps: float, inputs: Fp8Inputs, *, unit_offset: bool = False
    ) -> None:
        super().__init__(library, hidden_size, eps, unit_offset=unit_offset)
        self._inputs = inputs
        self._quantising = RmsNormFp8(library, hidden_size, eps, has_groups=inputs.has_groups, unit_offset=unit_offset)

    def launch(
        self,
        x: Tensor | None,
        weight: Tensor,
        out: Tensor,
        *,
        residual: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """See `RmsNorm`."""
        if rows is None:
            self._quantising.launch(x, weight, _memory_of(out), self._inputs.to_write(out), residual=residual)
        else:
            self._inputs.forget(out)
            super().launch(x, weight, out, residual=residual, rows=rows)


class QuantisingGate(SiluMul):
    """`SiluMul`, or a gate that is made alike, that also writes its result in e4m3, alone if ``out`` has no memory."""

    def __init__(self, library: KernelLibrary, width: int, gate: type[SiluMul], inputs: Fp8Inputs) -> None:
        self._inputs = inputs  # and not the gate's own kernel
        self._quantising = SiluMulFp8(library, width, has_groups=inputs.has_groups, macros=gate.macros)

    def launch(self, gate_up: Tensor, out: Tensor, *, delta: Tensor | None = None) -> None:
        """See `SiluMul`."""
        self._quantising.launch(gate_up, _memory_of(out), self._inputs.to_write(out), delta=delta)
