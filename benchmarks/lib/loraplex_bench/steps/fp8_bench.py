"""FP8 products of Llama-3-8B's layers, and the kernels that quantise their inputs, each timed alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import torch
from loraplex_common.architectures.registry import model_config
from loraplex_engine.model.fp8 import Fp8Weight, quantise
from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs, QuantisingGate, QuantisingNorm, padded_rows
from loraplex_engine.runners.cuda.fp8_linear import ScaledMmLinear, _multiply_rows
from loraplex_engine.runners.cuda.linears import CublasDense
from loraplex_kernels.module import KernelLibrary
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from loraplex_kernels.pointwise.silu_mul import SiluMul

from loraplex_bench.random_weights import quantise_blocks
from loraplex_bench.shapes import LLAMA3_8B
from loraplex_bench.steps.kernel_timer import require_close, time_us

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_kernels.pointwise.fp8 import Fp8Rows
    from torch import Tensor

OPS: Final = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
"""Inputs and outputs."""
COPIES: Final = 3
"""Weights of an op that take turns, so that none is in a cache."""


class Fp8Bench:
    """Products and pointwise kernels of one scheme of scales.

    Args:
        has_groups: Whether weights have a scale for each block of 128 x 128, and not for each output.
        max_rows: Most rows of a case.
    """

    def __init__(self, *, has_groups: bool, max_rows: int) -> None:
        self.device, self.has_groups = torch.device("cuda", 0), has_groups
        self.library = KernelLibrary(self.device, torch.bfloat16, dependent=True)
        self.inputs = Fp8Inputs(self.library, model_config(LLAMA3_8B.info.config), max_tokens=max_rows)
        self.inputs.has_groups = has_groups
        self.flush = torch.zeros(40 << 20, device=self.device)

    def randn(self, *shape: int) -> Tensor:
        """Return random activations or weights in bf16."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def product_us(self, op: str, rows: int) -> tuple[float, float]:
        """Return the times of an FP8 product whose input is quantised already, and of the bf16 product."""
        inputs, outputs = OPS[op]
        x, out = self.randn(rows, inputs), self.randn(padded_rows(rows), outputs)[:rows]
        weights = [self.randn(outputs, inputs) / inputs**0.5 for _ in range(COPIES)]
        linears = [ScaledMmLinear(self.inputs, self._quantised(weight)) for weight in weights]
        codes = self.inputs.of(x, has_groups=self.has_groups)
        linears[0]._product(codes, out, None)
        require_close(out, _plain(codes, rows) @ linears[0].rows(0, outputs).float().t(), f"{op}, {rows} rows")
        fp8 = time_us([functools.partial(each._product, codes, out, None) for each in linears], self.flush)
        dense = [functools.partial(CublasDense(weight).into, x, out) for weight in weights]
        return fp8, time_us(dense, self.flush)

    def torch_us(self, op: str, rows: int, *, is_fast: bool) -> float:
        """Return the time of torch's FP8 product of scales of outputs, whose tensor cores keep the sums if it is fast."""
        inputs, outputs = OPS[op]
        x, out = self.randn(padded_rows(rows), inputs), self.randn(padded_rows(rows), outputs)
        weights = [self._quantised(self.randn(outputs, inputs) / inputs**0.5) for _ in range(COPIES)]
        linears = [ScaledMmLinear(self.inputs, weight) for weight in weights]
        codes = self.inputs.of(x, has_groups=self.has_groups)
        calls = [
            functools.partial(_multiply_rows, codes, each._codes_t, each._scales_t, None, out, is_fast=is_fast)
            for each in linears
        ]
        calls[0]()
        require_close(
            out, _plain(codes, len(out)) @ linears[0].rows(0, outputs).float().t(), f"{op}, {rows} rows, torch"
        )
        return time_us(calls, self.flush)

    def pointwise_us(self, rows: int) -> dict[str, tuple[float, float]]:
        """Return the times of kernels that quantise, and of those that do not; of the attention's output 0."""
        hidden, width = 4096, 14336
        x, weight, residual = self.randn(rows, hidden), self.randn(hidden), self.randn(rows, hidden)
        out, gate_up, act = self.randn(rows, hidden), self.randn(rows, 2 * width), self.randn(rows, width)
        norms = (QuantisingNorm(self.library, hidden, 1e-5, self.inputs), RmsNorm(self.library, hidden, 1e-5))
        gates = (QuantisingGate(self.library, width, SiluMul, self.inputs), SiluMul(self.library, width))
        self.inputs.require(hidden, has_groups=self.has_groups)

        def once(call: Callable[[], object]) -> float:
            return time_us([call] * 4, self.flush)

        def norm(kernel: RmsNorm) -> float:
            return once(functools.partial(kernel.launch, x, weight, out, residual=residual))

        def gate(kernel: SiluMul) -> float:
            return once(functools.partial(kernel.launch, gate_up, act))

        return {
            "norm": (norm(norms[0]), norm(norms[1])),
            "gate": (gate(gates[0]), gate(gates[1])),
            "attended": (once(lambda: self.inputs.of(x, has_groups=self.has_groups)), 0.0),
        }

    def _quantised(self, weight: Tensor) -> Fp8Weight:
        quantised = quantise_blocks(weight) if self.has_groups else quantise(weight)
        return Fp8Weight(*quantised, is_blocked=self.has_groups, dtype=torch.bfloat16)


def _plain(inputs: Fp8Rows, rows: int) -> Tensor:
    """Return quantised inputs in fp32, ``[rows, inputs]``."""
    scales = inputs.scales[:, :rows].t()
    return (inputs.codes[:rows].float().view(rows, scales.shape[1], -1) * scales[..., None]).flatten(1)
