"""Products of few rows with FP8 and bf16 weights, beside fp32's: on the CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from loraplex_kernels import reference
from loraplex_kernels.pointwise.silu_mul import SiluMul
from loraplex_kernels.products.dense_product import DenseProduct
from loraplex_kernels.products.fp8_product import Fp8Product

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary
    from loraplex_kernels.products.fp8_cut import Cut

GROUP = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductCase:
    """A product of random numbers.

    Attributes:
        rows: Rows; the input's memory has room for a multiple of 8.
        inputs: Width of the input.
        outputs: Width of the output.
        has_groups: Whether scales belong to groups and blocks.
        has_bias: Whether a bias is added.
        accumulates: Whether the output is added to.
    """

    rows: int
    inputs: int
    outputs: int
    has_groups: bool = False
    has_bias: bool = False
    accumulates: bool = False


def maxima_of(y: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the largest absolute value of each row's parts of so many columns, fp32."""
    sizes = torch.nn.functional.pad(y.float().abs(), (0, -y.shape[1] % columns))
    return sizes.view(len(y), -1, columns).amax(2)


class ProductNumbers:
    """A case's numbers on a device, and its result in fp32."""

    def __init__(self, case: ProductCase, device: torch.device) -> None:
        self.case, generator = case, torch.Generator().manual_seed(case.rows)
        padded = -(-case.rows // 8) * 8
        steps, blocks = -(-case.inputs // GROUP), -(-case.outputs // GROUP)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def scales(*shape: int) -> torch.Tensor:
            return (torch.rand(*shape, generator=generator) + 0.5) / 64

        self.x = (numbers(padded, case.inputs) * 50).to(torch.float8_e4m3fn).to(device)
        self.weight = (numbers(case.outputs, case.inputs) * 50).to(torch.float8_e4m3fn).to(device)
        self.x_scales = scales(steps if case.has_groups else 1, padded).to(device)
        of_weight = (blocks, steps) if case.has_groups else (case.outputs,)
        self.weight_scales = scales(*of_weight).to(device)
        self.bias = numbers(case.outputs).to(torch.bfloat16).to(device) if case.has_bias else None
        self.before = numbers(case.rows, case.outputs).to(torch.bfloat16).to(device)

    def expected(self) -> torch.Tensor:
        """Return the result in fp32."""
        case = self.case
        y = reference.fp8_product(self.x, self.x_scales, self.weight, self.weight_scales)[: case.rows]
        if self.bias is not None:
            y = y + self.bias.float()
        return y + self.before.float() if case.accumulates else y

    def launched(self, library: KernelLibrary, cut: Cut) -> torch.Tensor:
        """Return what the kernel makes of it: every number is written."""
        case = self.case
        y = self.before.clone() if case.accumulates else torch.full_like(self.before, float("nan"))
        product = Fp8Product(library, cut, has_groups=case.has_groups)
        product.launch(
            product.input_map(self.x),
            self.x_scales,
            product.weight_map(self.weight),
            self.weight_scales,
            y,
            inputs=case.inputs,
            bias=self.bias,
            accumulates=case.accumulates,
        )
        return y

    def gated(
        self, library: KernelLibrary, cut: Cut, gate: type[SiluMul] = SiluMul
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what a gate's kernel makes of it, ``[rows, outputs / 2]``, and the largest of each row's parts, unless in groups."""
        case, width = self.case, self.case.outputs // 2
        product = Fp8Product(library, cut, has_groups=case.has_groups, gate=gate.macros)
        y = torch.full((case.rows, width), float("nan"), dtype=torch.bfloat16).to(self.x.device)
        maxima = torch.full((case.rows, -(-width // product.columns)), float("nan")).to(self.x.device)
        product.launch(
            product.input_map(self.x),
            self.x_scales,
            product.weight_map(self.weight),
            self.weight_scales,
            y,
            inputs=case.inputs,
            bias=self.bias,
            maxima=None if case.has_groups else maxima,
        )
        return y, None if case.has_groups else maxima

    def gated_apart(self, library: KernelLibrary, cut: Cut, gate: type[SiluMul] = SiluMul) -> torch.Tensor:
        """Return what a product and a gate's own kernel make of it."""
        y = torch.full((self.case.rows, self.case.outputs // 2), float("nan"), dtype=torch.bfloat16).to(self.x.device)
        gate(library, y.shape[1]).launch(self.launched(library, cut), y)
        return y


class DenseNumbers:
    """A case's numbers in bf16 on a device, and its result in fp32."""

    def __init__(self, case: ProductCase, device: torch.device) -> None:
        self.case, generator = case, torch.Generator().manual_seed(case.rows)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(device)

        self.x, self.weight = numbers(case.rows, case.inputs), numbers(case.outputs, case.inputs)
        self.bias = numbers(case.outputs) if case.has_bias else None
        self.before = numbers(case.rows, case.outputs)

    def expected(self) -> torch.Tensor:
        """Return the result in fp32."""
        y = self.x.float() @ self.weight.float().t()
        if self.bias is not None:
            y = y + self.bias.float()
        return y + self.before.float() if self.case.accumulates else y

    def launched(self, library: KernelLibrary, cut: Cut) -> torch.Tensor:
        """Return what the kernel makes of it: every number is written."""
        y = self.before.clone() if self.case.accumulates else torch.full_like(self.before, float("nan"))
        self._launch(DenseProduct(library, cut), y, accumulates=self.case.accumulates)
        return y

    def gated(self, library: KernelLibrary, cut: Cut, gate: type[SiluMul]) -> torch.Tensor:
        """Return what a gate's kernel makes of it, ``[rows, outputs / 2]``."""
        y = torch.full_like(self.before[:, : self.case.outputs // 2], float("nan")).contiguous()
        self._launch(DenseProduct(library, cut, gate=gate.macros), y)
        return y

    def gated_apart(self, library: KernelLibrary, cut: Cut, gate: type[SiluMul]) -> torch.Tensor:
        """Return what a product and a gate's own kernel make of it."""
        y = torch.full_like(self.before[:, : self.case.outputs // 2], float("nan")).contiguous()
        gate(library, y.shape[1]).launch(self.launched(library, cut), y)
        return y

    def _launch(self, product: DenseProduct, y: torch.Tensor, *, accumulates: bool = False) -> None:
        product.launch(
            product.input_map(self.x),
            product.weight_map(self.weight),
            y,
            inputs=self.case.inputs,
            bias=self.bias,
            accumulates=accumulates,
        )
