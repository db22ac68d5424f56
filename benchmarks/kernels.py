"""Times our kernels on the workloads of baselines/*.csv and prints them beside the floor and the best peer.

    python benchmarks/kernels.py --out benchmarks/results

Method, as the baselines': every case has several independent sets of weights (here: the layers of its adapters), one CUDA
graph holds one call per set, L2 is evicted by reading 160 MiB before each replay, two warm-ups, 15 replays between
events; median / number of calls. Items and tables are built outside the timed part: they serve all layers of a step.
Before timing, a case's result is compared with an fp32 reference on a few rows; a wrong case raises.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_bench.popularity import baseline_adapters
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.steps.attention_cases import (
    Case,
    attention_case,
    attention_prefill_case,
    attention_prefill_rows,
)
from loraplex_bench.steps.kernel_timer import require_close, time_us
from loraplex_bench.steps.lora_case import LoraCase
from loraplex_engine.runners.cuda import lora_grids
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.prefill import LoraPrefill
from loraplex_kernels.module import KernelLibrary
from loraplex_kernels.pointwise.silu_mul import SiluMul

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent

DEVICE = torch.device("cuda", 0)


def read_cases(name: str) -> list[Case]:
    if name in OWN_CASES:
        return OWN_CASES[name]()
    with (HERE / "baselines" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def decode_case(row: Case, library: KernelLibrary, flush: torch.Tensor) -> dict[str, float]:
    """Time shrink + expand of one decode case."""
    tokens, num_adapters = int(row["M"]), int(row["adapters"])
    case = LoraCase(DEVICE, row["outs"], row["rank"], num_adapters, int(row["weight_sets"]))
    shape = case.shapes[case.op_index]
    lora = LoraDecode(library, case.tables, case.pool, case.shapes, max_rows=tokens, max_items=1 << 16)
    adapters = baseline_adapters(tokens, row["popularity"])
    built = lora.prepare(adapters)
    op = case.op_index
    most = lora_grids.Grids.of(1 << 10, 132)
    grids = min(int(built.counts[2 * op]), most.shrink), min(int(built.counts[2 * op + 1]), most.expand)
    x = torch.randn(tokens, shape.columns, device=DEVICE, dtype=torch.bfloat16)
    y = torch.zeros(tokens, sum(shape.outputs), device=DEVICE, dtype=torch.bfloat16)
    h, scale = lora.new_scratch(), torch.ones(tokens, device=DEVICE)

    def call(layer: int) -> None:
        lora.shrink(layer, case.op, x, h, grids[0])
        lora.expand_add(layer, case.op, h, scale, y, grids[1])

    call(0)
    for token in range(min(tokens, 3)):
        delta = case.expected(int(adapters[token]), x[token : token + 1])
        require_close(y[token : token + 1], delta, str(row))
    y.copy_(0.3 * torch.randn_like(y))
    layers = range(case.sets)
    both = time_us([lambda layer=layer: call(layer) for layer in layers], flush)  # type: ignore[misc]
    shrink = time_us([lambda layer=layer: lora.shrink(layer, case.op, x, h, grids[0]) for layer in layers], flush)  # type: ignore[misc]
    return {"op": both, "shrink": shrink}


def ragged(tokens: int, adapters: int) -> np.ndarray:
    """The baselines' segment lengths: one contiguous segment per adapter, the remainder on the first."""
    generator = torch.Generator().manual_seed(tokens + adapters)
    shares = torch.rand(adapters, generator=generator) + 0.25
    lengths = (shares / shares.sum() * tokens).long().numpy().astype(np.int32)
    lengths[0] += tokens - lengths.sum()
    return lengths


def prefill_case(row: Case, library: KernelLibrary, flush: torch.Tensor) -> dict[str, float]:
    """Time one prefill case, shrink and expand in one launch."""
    tokens, num_adapters = int(row["tokens"]), int(row["adapters"])
    case = LoraCase(DEVICE, row["outs"], row["rank"], num_adapters, int(row["weight_sets"]))
    shape = case.shapes[case.op_index]
    lora = LoraPrefill(library, case.tables, case.pool, case.shapes, max_items=1 << 17)
    lengths = ragged(tokens, num_adapters)
    lora.prepare(np.arange(num_adapters, dtype=np.int32), lengths)
    x = torch.randn(tokens, shape.columns, device=DEVICE, dtype=torch.bfloat16)
    y = torch.zeros(tokens, sum(shape.outputs), device=DEVICE, dtype=torch.bfloat16)
    scale = torch.ones(tokens, device=DEVICE)
    lora.apply(0, case.op, x, scale, y)
    for index, end in list(enumerate(np.cumsum(lengths)))[:: max(1, num_adapters // 3)]:
        rows = slice(int(end - lengths[index]), int(end))
        expected = case.expected(index, x[rows])
        require_close(y[rows, : expected.shape[1]], expected, str(row))
    y.copy_(0.3 * torch.randn_like(y))
    calls = [lambda layer=layer: lora.apply(layer, case.op, x, scale, y) for layer in range(case.sets)]
    return {"op": time_us(calls, flush)}


def launch_rows() -> list[Case]:
    """Host time of one launch outside a graph; the ceiling is ours."""
    return [{"kernel": "silu_mul", "floor_us": "10"}]


def launch_case(row: Case, library: KernelLibrary, flush: torch.Tensor) -> dict[str, float]:
    """Time the host side of a launch, its checks included."""
    del row, flush
    kernel, gate_up = SiluMul(library, 64), torch.zeros(1, 128, device=DEVICE, dtype=torch.bfloat16)
    out, times = torch.zeros(1, 64, device=DEVICE, dtype=torch.bfloat16), []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            kernel.launch(gate_up, out)
        times.append((time.perf_counter() - start) * 1e4)
    return {"op": statistics.median(times)}


OWN_CASES = {"attention_prefill": attention_prefill_rows, "launch": launch_rows}
SUITES: dict[str, tuple[Callable[[Case, KernelLibrary, torch.Tensor], dict[str, float]], tuple[str, ...]]] = {
    "kernels_decode": (decode_case, ("M", "K", "outs", "rank", "popularity", "adapters")),
    "kernels_prefill": (prefill_case, ("tokens", "K", "outs", "rank", "adapters")),
    "attention_prefill": (attention_prefill_case, ("tokens", "cached", "sequences")),
    "launch": (launch_case, ("kernel",)),
    "attention": (attention_case, ("batch", "context", "q_heads", "kv_heads", "head_dim", "page_tokens")),
}


def best_peer(suite: str, row: Case) -> tuple[str, float]:
    if suite in OWN_CASES:
        return "", 0.0
    if suite != "attention":
        return row["best_peer"], float(row["best_us"])
    peers = {
        key.removesuffix("_us"): float(row[key])
        for key in row
        if key.endswith("_us") and key != "floor_us" and row[key]
    }
    paged = {name: value for name, value in peers.items() if name.startswith("vllm")}
    return min(paged.items(), key=lambda item: item[1])


def run_suite(results: Results, suite: str, every: int, library: KernelLibrary, variant: str, until: float) -> None:
    """Time every n-th case of a suite until time is up."""
    run, columns = SUITES[suite]
    flush = torch.ones(160 << 18, device=DEVICE)
    for row in read_cases(suite)[::every]:
        if time.monotonic() > until:
            print(f"{suite}: out of time, the rest is left out", file=sys.stderr)
            return
        peer, peer_us = best_peer(suite, row)
        case = "/".join(row[column] for column in columns)
        for metric, value in run(row, library, flush).items():
            results.add(
                Row(
                    suite=suite,
                    case=case,
                    metric=metric if variant == "plain" else f"{metric}:{variant}",
                    value=round(value, 2),
                    unit="us",
                    floor=float(row["floor_us"]),
                    peer=peer,
                    peer_value=peer_us or None,
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--every", type=int, default=1, help="take every n-th case")
    parser.add_argument("--variants", nargs="+", default=["plain", "pdl"], choices=["plain", "pdl"])
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    parser.add_argument("--limit-s", type=float, default=1e9, help="stop starting cases after this long")
    args = parser.parse_args()
    until, results = time.monotonic() + args.limit_s, Results()
    results.print_head()
    try:
        for variant in args.variants:
            library = KernelLibrary(DEVICE, torch.bfloat16, dependent=variant == "pdl")
            for suite in args.suites:
                run_suite(results, suite, args.every, library, variant, until)
    finally:
        if results.rows:  # what was measured before a failure is not lost
            results.write(args.out, "kernels", commit=args.commit)


if __name__ == "__main__":
    main()
