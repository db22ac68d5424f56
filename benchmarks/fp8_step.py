"""A decode step of Llama-3-8B with FP8 weights beside its bytes, and beside its products and attention timed alone.

    python benchmarks/fp8_step.py --out benchmarks/results     # one H100 or H200: about 60 s
    python benchmarks/fp8_step.py --ablate --out benchmarks/results

64 rows of 320 tokens, no adapters. `floor` of the step: weights, lm_head, keys and values, each in its own type, at this card's own
rate of a copy. `products and attention`: the four FP8 products, the attention of 32 layers, and lm_head, each alone inside a CUDA
graph, its weights not in L2, in the same run. Bars: a step takes at most 1.45 times its floor and 1.12 times that sum.

With --ablate: what one kernel after the other adds to the step (it is left out), and what the step takes with kernels cut another way,
scales of outputs. The whole step is measured first and last; what these two differ by is noise.
"""

from __future__ import annotations

import argparse
import functools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from loraplex_bench.end_to_end.context import free_device
from loraplex_bench.floors import kv_bytes_per_token, step_weight_bytes
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.shapes import LLAMA3_8B_FP8, AdapterFamily, Shape
from loraplex_bench.steps.attention_bench import attention_us, layout_of
from loraplex_bench.steps.fp8_bench import OPS, Fp8Bench
from loraplex_bench.steps.kernel_timer import copy_bytes_per_s, time_us
from loraplex_bench.steps.plan import StepSize
from loraplex_bench.steps.step_bench import StepBench
from loraplex_bench.steps.step_changes import LEFT_OUT, OTHERWISE, Change
from loraplex_engine.runners.cuda.linears import CublasDense

SIZE: Final = StepSize(num_decode=64)
BARS: Final = {"of its bytes": 1.45, "of products and attention": 1.12}
REPEATS: Final = 3


def alone_us(shape: Shape, results: Results) -> float:
    """Return the sum of a step's products and attention, each timed alone; adds a row for each."""
    bench = Fp8Bench(has_groups=shape.has_fp8_blocks, max_rows=SIZE.num_decode)
    layers, rows = shape.info.num_layers, SIZE.num_decode
    parts = {op: (bench.product_us(op, rows)[0], layers) for op in OPS}
    kv = layout_of(is_fp8=bool(shape.kv_dtype))
    attention, _ = attention_us(bench.library, kv, bench.flush, rows=rows, context=SIZE.context)
    x, weight = bench.randn(rows, shape.info.hidden_size), bench.randn(shape.info.vocab_size, shape.info.hidden_size)
    out = bench.randn(rows, shape.info.vocab_size)
    lm_head = time_us([functools.partial(CublasDense(weight).into, x, out)] * 2, bench.flush)
    parts |= {"attention": (attention, layers), "lm_head": (lm_head, 1)}
    for name, (value, count) in parts.items():
        results.add(Row(suite="fp8_step", case=f"{case_of(shape)}/{name} alone", metric="time", value=value, unit="us"))
        results.note(f"{name}: {count} in a step")
    return sum(value * count for value, count in parts.values())


def case_of(shape: Shape) -> str:
    """Return what rows call a shape."""
    kinds = shape.form, "FP8 KV" if shape.kv_dtype else ""
    return "/".join(part for part in (shape.name, *kinds, f"{SIZE.num_decode} rows") if part)


def step_ms(shape: Shape) -> float:
    """Return the best of several measurements of a step."""
    bench = StepBench(shape, AdapterFamily(), 0, [SIZE])
    return min(bench.step_ms(SIZE, 0)[0] for _ in range(REPEATS))


def measure(shape: Shape, rate: float, results: Results) -> None:
    """Add a shape's rows."""
    step = step_ms(shape)
    free_device()
    floor = (step_weight_bytes(shape) + SIZE.num_decode * SIZE.context * kv_bytes_per_token(shape)) / rate * 1e3
    alone = alone_us(shape, results) / 1e3
    case = case_of(shape)
    for metric, value in (("step", step), ("products and attention", alone)):
        results.add(Row(suite="fp8_step", case=case, metric=metric, value=value, unit="ms", floor=floor))
    for (metric, bar), whole in zip(BARS.items(), (floor, alone), strict=True):
        results.add(Row(suite="fp8_step", case=case, metric=metric, value=step / whole, unit="x", floor=bar))


def ablate(shape: Shape, results: Results) -> None:
    """Add what each of `LEFT_OUT` adds to a step, and what each of `OTHERWISE` does to it, microseconds."""
    case, whole = case_of(shape), changed_step_ms(shape, nullcontext)
    results.add(Row(suite="fp8_step", case=case, metric="step", value=whole, unit="ms"))
    for name, change in LEFT_OUT.items():
        added = (whole - changed_step_ms(shape, change)) * 1e3
        results.add(Row(suite="fp8_step", case=f"{case}/{name}", metric="added", value=added, unit="us"))
    for name, change in OTHERWISE.items():
        more = (changed_step_ms(shape, change) - whole) * 1e3
        results.add(Row(suite="fp8_step", case=f"{case}/{name}", metric="more", value=more, unit="us"))
    again = (changed_step_ms(shape, nullcontext) - whole) * 1e3
    results.add(Row(suite="fp8_step", case=f"{case}/as it is, again", metric="more", value=again, unit="us"))


def changed_step_ms(shape: Shape, change: Change) -> float:
    """Return what a step takes in an engine that is made with a change."""
    torch.manual_seed(0)
    with change():
        step = step_ms(shape)
    free_device()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ablate", action="store_true", help="leave one kernel after the other out, and cut some otherwise"
    )
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    results = Results()
    if args.ablate:
        results.print_head()
        ablate(LLAMA3_8B_FP8, results)
    else:
        measure_all(results)
    if args.out:
        results.write(args.out, "fp8-step-ablated" if args.ablate else "fp8-step", commit=args.commit)


def measure_all(results: Results) -> None:
    """Add the rows of each kind of weights."""
    rate = copy_bytes_per_s()
    results.note(f"a copy reads and writes {rate / 1e12:.2f} TB/s; `floor` of a ratio is its bar")
    results.print_head()
    blocks = replace(LLAMA3_8B_FP8, has_fp8_blocks=True)
    for shape in (LLAMA3_8B_FP8, blocks, replace(LLAMA3_8B_FP8, kv_dtype="fp8")):
        torch.manual_seed(0)
        measure(shape, rate, results)
        free_device()


if __name__ == "__main__":
    main()
