"""Times dense products of few rows by our kernel beside cuBLAS's, and gate_up's with the gate in them beside cuBLAS's and a gate's.

    python benchmarks/dense_products.py --out benchmarks/results     # one H100 or H200: about 30 s
    python benchmarks/dense_products.py --steps --out benchmarks/results   # whole decode steps: about 150 s
    python benchmarks/dense_products.py --smoke                      # no GPU: compiles the kernels

bf16, weights cold in L2, inside CUDA graphs, medians. `floor`: the bytes of the weight at the rate of a copy. With --steps, decode steps of
whole models at a context of 320 with our kernel and without it, which is the peer: cuBLAS's, measured before and after, the better
of both; without adapters, and with one of rank 16 on all projections for each row, 32 at most.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Final

import torch
from loraplex_bench.base_shapes import BF16_SHAPES
from loraplex_bench.end_to_end.context import free_device
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.shapes import AdapterFamily, Shape
from loraplex_bench.steps.kernel_timer import copy_bytes_per_s, require_close, time_us
from loraplex_bench.steps.plan import StepSize
from loraplex_bench.steps.step_bench import StepBench
from loraplex_bench.steps.step_changes import changed
from loraplex_engine.runners.cuda import few_row_dense
from loraplex_engine.runners.cuda.few_row_dense import DenseGateProducts, DenseProducts, FewRowDense
from loraplex_engine.runners.cuda.linears import CublasDense
from loraplex_kernels.compiler import Build, compile_kernel
from loraplex_kernels.module import KernelLibrary
from loraplex_kernels.pointwise.silu_mul import SiluMul
from loraplex_kernels.products import fp8_cut

NUM_SMS: Final = 132  # of an H100 or H200
ROWS: Final = (1, 8, 16, 32, 64)
MODELS: Final = {
    "llama3-8b": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
    "gemma3-4b": {"qkv": (2560, 4096), "o": (2048, 2560), "gate_up": (2560, 20480), "down": (10240, 2560)},
    "llama2-7b": {"qkv": (4096, 12288), "gate_up": (4096, 22016), "down": (11008, 4096)},
    "phi4": {"qkv": (5120, 7680), "o": (5120, 5120), "gate_up": (5120, 35840), "down": (17920, 5120)},
    "smollm2-135m": {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)},
}
"""Inputs and outputs of each product."""
COPIES: Final = 3
"""Weights of an op that take turns, so that none is in a cache."""
STEP_ROWS: Final = (1, 8, 32, 64)
MOST_ADAPTERS: Final = 32
REPEATS: Final = 3


def smoke() -> None:
    """Compile the kernels for sm_90a."""
    widths = sorted({outputs for ops in MODELS.values() for _, outputs in ops.values()})
    cuts = dict.fromkeys(cut for outputs in widths for cut in fp8_cut.dense_cuts(outputs, NUM_SMS))
    for cut in cuts:
        defines = (fp8_cut.DENSE_MACRO, *cut.defines(has_groups=False))
        program = compile_kernel(Build(name="fp8_product", defines=defines), "sm_90a")
        print(f"{cut}: {program.registers} registers, {program.spill_bytes} B spilled")


class DenseBench:
    """The products of one op.

    Args:
        library: Kernels in bf16.
        flush: Memory larger than L2.
        inputs: Width of the input.
        outputs: Width of the output.
    """

    def __init__(self, library: KernelLibrary, flush: torch.Tensor, inputs: int, outputs: int) -> None:
        self._library, self._flush, self._inputs, self._outputs = library, flush, inputs, outputs
        weights = [self._randn(outputs, inputs) / inputs**0.5 for _ in range(COPIES)]
        products = DenseProducts(library)
        self._own = [FewRowDense(products, each) for each in weights]
        self._cublas = [CublasDense(each) for each in weights]

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._flush.device, dtype=torch.bfloat16)

    def max_rows(self) -> int:
        """Return the most rows that our kernel computes."""
        return 0 if self._own[0].few_rows is None else self._own[0].few_rows.max_rows

    def product_us(self, rows: int) -> tuple[float, float]:
        """Return the times of our product and of cuBLAS's."""
        x, y = self._randn(rows, self._inputs), self._randn(rows, self._outputs)
        self._own[0].into(x, y)
        require_close(y, x.float() @ self._own[0].weight.float().t(), f"{self._outputs} outputs, {rows} rows")
        own = time_us([functools.partial(each.into, x, y) for each in self._own], self._flush)
        return own, time_us([functools.partial(each.into, x, y) for each in self._cublas], self._flush)

    def gate_us(self, rows: int) -> tuple[float, float]:
        """Return the times of gate_up's product with the gate in it, and of cuBLAS's with a gate behind it."""
        width, silu_mul = self._outputs // 2, SiluMul(self._library, self._outputs // 2)
        x, y, act, apart = (self._randn(rows, each) for each in (self._inputs, self._outputs, width, width))
        gates = DenseGateProducts(self._own, SiluMul.macros)
        if not gates.launch(0, self._own[0], x, y, act):
            raise RuntimeError(f"no gate's kernel of {self._outputs} outputs and {rows} rows")

        def behind(linear: CublasDense) -> None:
            linear.into(x, y)
            silu_mul.launch(y, apart)

        self._own[0].into(x, y)
        silu_mul.launch(y, apart)
        if not torch.equal(act, apart):
            raise RuntimeError(f"a gate of {self._outputs} outputs and {rows} rows is not what it is apart")
        own = [functools.partial(gates.launch, at, each, x, y, act) for at, each in enumerate(self._own)]
        return time_us(own, self._flush), time_us(
            [functools.partial(behind, each) for each in self._cublas], self._flush
        )


def measure_products(results: Results) -> None:
    """Add rows of single products."""
    device = torch.device("cuda", 0)
    library = KernelLibrary(device, torch.bfloat16, dependent=True)
    flush, rate = torch.zeros(40 << 20, device=device), copy_bytes_per_s()
    results.note(f"a copy reads and writes {rate / 1e12:.2f} TB/s")
    for model, ops in MODELS.items():
        for op, (inputs, outputs) in ops.items():
            bench, floor = DenseBench(library, flush, inputs, outputs), inputs * outputs * 2 / rate * 1e6
            for rows in (each for each in ROWS if each <= bench.max_rows()):
                timed = {op: bench.product_us(rows)}
                if op == "gate_up":
                    timed["gate_up and gate"] = bench.gate_us(rows)
                for name, (own, cublas) in timed.items():
                    results.add(
                        Row(
                            suite="dense_products",
                            case=f"{model}/{name}/{rows} rows",
                            metric="time",
                            value=own,
                            unit="us",
                            floor=floor,
                            peer="cuBLAS",
                            peer_value=cublas,
                        )
                    )


def step_ms(shape: Shape) -> dict[tuple[int, int], float]:
    """Return what decode steps take, in ms, by (rows, adapters): the best of several measurements."""
    sizes = [StepSize(num_decode=rows) for rows in STEP_ROWS]
    bench = StepBench(shape, AdapterFamily(), MOST_ADAPTERS, sizes)
    cases = [(size, number) for size in sizes for number in (0, min(size.num_decode, MOST_ADAPTERS))]
    found = {
        (size.num_decode, number): min(bench.step_ms(size, number)[0] for _ in range(REPEATS)) for size, number in cases
    }
    bench.runner.close()
    del bench
    free_device()
    return found


def measure_steps(results: Results) -> None:
    """Add rows of whole steps."""
    for shape in BF16_SHAPES:
        with changed(few_row_dense, ARCH="none"):
            before = step_ms(shape)
        own = step_ms(shape)
        with changed(few_row_dense, ARCH="none"):
            after = step_ms(shape)
        for (rows, number), value in own.items():
            cublas = before[rows, number], after[rows, number]
            case = f"{shape.name}/step/{rows} rows/{number} adapters"
            results.add(
                Row(
                    suite="dense_products",
                    case=case,
                    metric="time",
                    value=value,
                    unit="ms",
                    peer="cuBLAS",
                    peer_value=min(cublas),
                )
            )
            results.note(f"{case}: cuBLAS's two runs {cublas[0]:.3f} and {cublas[1]:.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="compile for sm_90a, no GPU")
    parser.add_argument("--steps", action="store_true", help="whole decode steps in the place of products")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    if args.smoke:
        smoke()
        return
    results = Results()
    results.print_head()
    if args.steps:
        measure_steps(results)
    else:
        measure_products(results)
    if args.out:
        results.write(args.out, "dense-products", commit=args.commit)


if __name__ == "__main__":
    main()
