"""Times FP8 products of Llama-3-8B's layers with the kernels that quantise their inputs, against bf16 products.

    python benchmarks/fp8_products.py --out benchmarks/results     # one H100 or H200
    python benchmarks/fp8_products.py --smoke                      # no GPU: compiles the kernels

Weights cold in L2, inside CUDA graphs, medians. `floor` of a product: the bytes of its weight at the rate of a copy.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.shapes import LLAMA3_8B
from loraplex_bench.steps.kernel_timer import copy_bytes_per_s, require_close, time_us
from loraplex_common.architectures.registry import model_config
from loraplex_engine.model.fp8 import Fp8Weight, quantise
from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs, QuantisingGate, QuantisingNorm, padded_rows
from loraplex_engine.runners.cuda.fp8_linear import ScaledMmLinear
from loraplex_engine.runners.cuda.linears import CublasDense
from loraplex_kernels.compiler import Build, compile_kernel
from loraplex_kernels.module import KernelLibrary
from loraplex_kernels.pointwise.fp8 import row_build
from loraplex_kernels.pointwise.rms_norm import RmsNorm, rms_norm_build
from loraplex_kernels.pointwise.silu_mul import SiluMul
from loraplex_kernels.products.fp8_cut import choose_cuts

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_kernels.pointwise.fp8 import Fp8Rows
    from torch import Tensor

OPS: Final = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
"""Inputs and outputs."""
ROWS: Final = (1, 8, 64, 128, 256, 1024, 8192)
NUM_SMS: Final = 132  # of an H100 or H200
COPIES: Final = 3
"""Weights of an op that take turns, so that none is in a cache."""


class Fp8Bench:
    """Products and pointwise kernels of one scheme of scales.

    Args:
        has_groups: Whether weights have a scale for each block of 128 x 128, and not for each output.
    """

    def __init__(self, *, has_groups: bool) -> None:
        self.device, self.has_groups = torch.device("cuda", 0), has_groups
        self.library = KernelLibrary(self.device, torch.bfloat16, dependent=True)
        self.inputs = Fp8Inputs(self.library, model_config(LLAMA3_8B.info.config), max_tokens=max(ROWS))
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
        if not self.has_groups:
            return Fp8Weight(*quantise(weight), is_blocked=False, dtype=torch.bfloat16)
        outputs, inputs = weight.shape
        blocks = weight.view(outputs // 128, 128, inputs // 128, 128).transpose(1, 2).flatten(2)
        codes, scales = quantise(blocks)
        codes = codes.view(torch.uint8).view(outputs // 128, inputs // 128, 128, 128).transpose(1, 2)
        codes = codes.reshape(outputs, inputs).view(torch.float8_e4m3fn)
        return Fp8Weight(codes, scales[..., 0].contiguous(), is_blocked=True, dtype=torch.bfloat16)


def _plain(inputs: Fp8Rows, rows: int) -> Tensor:
    """Return quantised inputs in fp32, ``[rows, inputs]``."""
    scales = inputs.scales[:, :rows].t()
    return (inputs.codes[:rows].float().view(rows, scales.shape[1], -1) * scales[..., None]).flatten(1)


def smoke() -> None:
    """Compile the kernels for sm_90a."""
    norm, _ = rms_norm_build(4096, torch.bfloat16)
    gate, _ = row_build(14336, torch.bfloat16, has_groups=False)
    attended, _ = row_build(4096, torch.bfloat16, has_groups=False)
    cuts = [cut for outputs in {each for _, each in OPS.values()} for cut in choose_cuts(outputs, NUM_SMS)]
    products = [("fp8_product", cut.defines(has_groups=has_groups)) for cut in cuts for has_groups in (False, True)]
    gates = ("silu_mul_fp8", gate), ("silu_mul_fp8_many", gate[:1])
    for name, defines in (("rms_norm_fp8", norm), *gates, ("quantise_fp8", attended), *products):
        program = compile_kernel(Build(name=name, defines=defines), "sm_90a")
        print(f"{name}: {program.registers} registers, {program.spill_bytes} B spilled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="compile for sm_90a, no GPU")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    if args.smoke:
        smoke()
        return
    results = Results()
    results.print_head()
    for has_groups in (False, True):
        bench, kind = Fp8Bench(has_groups=has_groups), "blocks" if has_groups else "outputs"
        rate = copy_bytes_per_s()
        results.note(f"a copy reads and writes {rate / 1e12:.2f} TB/s")

        def add(case: str, own: float, peer: float, floor: float | None = None) -> None:
            results.add(
                Row(
                    suite="fp8_products",
                    case=case,
                    metric="time",
                    value=own,
                    unit="us",
                    floor=floor,
                    peer="bf16",
                    peer_value=peer,
                )
            )

        for rows in ROWS:
            for op, (inputs, outputs) in OPS.items():
                add(f"{kind}/{op}/{rows}", *bench.product_us(op, rows), inputs * outputs / rate * 1e6)
            for name, times in bench.pointwise_us(rows).items():
                add(f"{kind}/{name}/{rows}", *times)
    if args.out:
        results.write(args.out, "fp8-products", commit=args.commit)


if __name__ == "__main__":
    main()
