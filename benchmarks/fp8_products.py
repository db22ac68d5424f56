"""Times FP8 products of Llama-3-8B's layers with the kernels that quantise their inputs, against bf16 products.

    python benchmarks/fp8_products.py --out benchmarks/results     # one H100 or H200
    python benchmarks/fp8_products.py --smoke                      # no GPU: compiles the kernels

Weights cold in L2, inside CUDA graphs, medians. `floor` of a product: the bytes of its weight at the rate of a copy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import torch
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.steps.fp8_bench import OPS, Fp8Bench
from loraplex_bench.steps.kernel_timer import copy_bytes_per_s
from loraplex_kernels.compiler import Build, compile_kernel
from loraplex_kernels.pointwise.fp8 import GateCut, row_build
from loraplex_kernels.pointwise.rms_norm import rms_norm_build
from loraplex_kernels.products.fp8_cut import choose_cuts

ROWS: Final = (1, 8, 64, 128, 256, 512, 1024, 8192)
FAST_ROWS: Final = (256, 512, 8192)
"""Rows of which torch's products are timed with sums in fp32, and with sums that stay in tensor cores."""
NUM_SMS: Final = 132  # of an H100 or H200


def smoke() -> None:
    """Compile the kernels for sm_90a."""
    norm, _ = rms_norm_build(4096, torch.bfloat16)
    gate = GateCut(shares=2, block=448, vectors=2)
    attended, _ = row_build(4096, torch.bfloat16, has_groups=False)
    cuts = [cut for outputs in {each for _, each in OPS.values()} for cut in choose_cuts(outputs, NUM_SMS)]
    products = [("fp8_product", cut.defines(has_groups=has_groups)) for cut in cuts for has_groups in (False, True)]
    gates = ("silu_mul_fp8", ("WIDTH=14336", *gate.defines(has_groups=False))), ("silu_mul_fp8_many", ("WIDTH=14336",))
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
        bench, kind = Fp8Bench(has_groups=has_groups, max_rows=max(ROWS)), "blocks" if has_groups else "outputs"
        rate = copy_bytes_per_s()
        results.note(f"a copy reads and writes {rate / 1e12:.2f} TB/s")

        def add(case: str, own: float, other: float, floor: float | None = None, peer: str = "bf16") -> None:
            results.add(
                Row(
                    suite="fp8_products",
                    case=case,
                    metric="time",
                    value=own,
                    unit="us",
                    floor=floor,
                    peer=peer,
                    peer_value=other,
                )
            )

        for rows in ROWS:
            for op, (inputs, outputs) in OPS.items():
                add(f"{kind}/{op}/{rows}", *bench.product_us(op, rows), inputs * outputs / rate * 1e6)
            for op in OPS if rows in FAST_ROWS and kind == "outputs" else ():  # torch refuses it for blocks
                exact, fast = (bench.torch_us(op, rows, is_fast=is_fast) for is_fast in (False, True))
                add(f"{kind}/{op}/{rows}/sums in tensor cores", fast, exact, peer="sums in fp32")
            for name, times in bench.pointwise_us(rows).items():
                add(f"{kind}/{name}/{rows}", *times)
    if args.out:
        results.write(args.out, "fp8-products", commit=args.commit)


if __name__ == "__main__":
    main()
