"""Times our kernels on the workloads of baselines/*.csv and prints them beside the floor and the best peer.

    PYTHONPATH=kernels:services/common python benchmarks/kernels.py --out benchmarks/results

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
from loraplex_engine.runners.cuda import lora_paths
from loraplex_kernels import reference
from loraplex_kernels.attention_decode import AttentionDecode
from loraplex_kernels.attention_prefill import AttentionPrefill, make_tiles
from loraplex_kernels.lora_decode import LoraDecode
from loraplex_kernels.lora_prefill import LoraPrefill
from loraplex_kernels.module import KernelLibrary
from loraplex_kernels.paged_kv import KvLayout
from loraplex_kernels.silu_mul import SiluMul

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "lib"))

from loraplex_bench.lora_case import LoraCase  # noqa: E402
from loraplex_bench.popularity import baseline_adapters  # noqa: E402
from loraplex_bench.results import Results, Row, head_commit  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda", 0)
REPLAYS = 15
MAX_ERROR = 2e-2
Case = dict[str, str]


def time_us(calls: list[Callable[[], None]], flush: torch.Tensor) -> float:
    """Median time of one call, in microseconds, with weights cold in L2."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for index in range(REPLAYS + 2):
        flush.sum()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times)


def read_cases(name: str) -> list[Case]:
    if name in OWN_CASES:
        return OWN_CASES[name]()
    with (HERE / "baselines" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def require_close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    error = ((got.float() - want.float()).norm() / want.float().norm()).item()
    if not error < MAX_ERROR:
        raise RuntimeError(f"{what}: relative error {error:.3g}")


def decode_case(row: Case, library: KernelLibrary, flush: torch.Tensor) -> dict[str, float]:
    """Time shrink + expand of one decode case."""
    tokens, num_adapters = int(row["M"]), int(row["adapters"])
    case = LoraCase(DEVICE, row["outs"], row["rank"], num_adapters, int(row["weight_sets"]))
    shape = case.shapes[case.op_index]
    lora = LoraDecode(library, case.tables, case.pool, case.shapes, max_rows=tokens, max_items=1 << 16)
    adapters = baseline_adapters(tokens, row["popularity"])
    built = lora.prepare(adapters)
    op = case.op_index
    most = lora_paths.Grids.of(1 << 10, 132)
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
    return {"op": time_us(calls, flush)}  # type: ignore[arg-type]


def attention_case(row: Case, library: KernelLibrary, flush: torch.Tensor) -> dict[str, float]:
    """Time paged decode attention; each layer is a set of K and V."""
    batch, context, heads, kv_heads = (int(row[key]) for key in ("batch", "context", "q_heads", "kv_heads"))
    head_dim, block = int(row["head_dim"]), int(row["page_tokens"])
    layer_bytes = 2 * kv_heads * block * head_dim * 2
    pages = batch * context // block
    layers = max(2, min(8, (24 << 30) // (pages * layer_bytes)))
    kv = KvLayout(
        page_bytes=layers * layer_bytes, block_tokens=block, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )
    pool = torch.randn(pages * layers * layer_bytes // 2, device=DEVICE, dtype=torch.bfloat16).view(torch.uint8)
    pool = pool.view(pages, -1)
    tables = torch.randperm(pages, device=DEVICE).int().view(batch, -1)
    q = torch.randn(batch, kv.qkv_width, device=DEVICE, dtype=torch.bfloat16)
    lens = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    out = torch.full((batch, heads * head_dim), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    kernel = AttentionDecode(library, kv, max_rows=8 * batch, max_context=context)
    kernel.launch(0, pool, q, tables, lens, out)
    for sequence in range(2):
        key, value = reference.read_kv(pool, kv, torch.bfloat16, 0, tables[sequence], context)
        query = q[sequence : sequence + 1, : heads * head_dim].view(1, heads, head_dim)
        require_close(
            out[sequence].view(1, heads, -1), reference.attention(query, key, value, context - 1, kv), str(row)
        )
    chosen = kernel.splits(batch)
    times = {}
    for splits in sorted({chosen, 1, 2, 4, 8}):
        calls = [
            lambda layer=layer, s=splits: kernel.launch(layer, pool, q, tables, lens, out, splits=s)
            for layer in range(layers)
        ]
        if splits <= max(2, chosen * 2):
            times["op" if splits == chosen else f"splits{splits}"] = time_us(calls, flush)  # type: ignore[arg-type]
    return times


PREFILL_CHUNKS = ((2048, 0, 1), (512, 3584, 4), (256, 0, 32))  # tokens, cached tokens, sequences
PEAK_FLOPS = 787e12


def attention_prefill_rows() -> list[Case]:
    """Our own cases, Llama-3-8B heads; the floor is arithmetic at the measured GEMM rate, there is no peer."""
    rows = []
    for tokens, cached, sequences in PREFILL_CHUNKS:
        flops = 4 * 32 * 128 * sequences * sum(cached + i + 1 for i in range(tokens))
        rows.append(
            {
                "tokens": str(tokens),
                "cached": str(cached),
                "sequences": str(sequences),
                "floor_us": f"{flops / PEAK_FLOPS * 1e6:.2f}",
            }
        )
    return rows


def attention_prefill_case(row: Case, library: KernelLibrary, flush: torch.Tensor) -> dict[str, float]:
    """Time chunked prefill attention, 32 heads, 8 KV heads, head size 128, pages of 16 tokens."""
    tokens, cached, sequences = (int(row[key]) for key in ("tokens", "cached", "sequences"))
    layers, context = 4, tokens + cached
    kv = KvLayout(page_bytes=layers * 65536, block_tokens=16, num_heads=32, num_kv_heads=8, head_dim=128)
    pool = torch.randn(sequences * context // 16 * layers * 32768, device=DEVICE, dtype=torch.bfloat16).view(
        torch.uint8
    )
    pool = pool.view(-1, kv.page_bytes)
    tables = torch.randperm(len(pool), device=DEVICE).int().view(sequences, -1)
    q = torch.randn(sequences * tokens, kv.qkv_width, device=DEVICE, dtype=torch.bfloat16)
    out = torch.full((sequences * tokens, 4096), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    numbers = np.arange(sequences, dtype=np.int32)
    made = make_tiles(numbers, np.full_like(numbers, cached), np.full_like(numbers, tokens), 0, 4)
    tiles, kernel = torch.from_numpy(made).to(DEVICE), AttentionPrefill(library, kv)
    kernel.launch(0, pool, q, tables, tiles, out)
    key, value = reference.read_kv(pool, kv, torch.bfloat16, 0, tables[0], context)
    expected = reference.attention(q[:tokens, :4096].view(tokens, 32, 128), key, value, cached, kv)
    require_close(out[:tokens].view(tokens, 32, 128), expected, str(row))
    calls = [lambda layer=layer: kernel.launch(layer, pool, q, tables, tiles, out) for layer in range(layers)]
    return {"op": time_us(calls, flush)}  # type: ignore[arg-type]


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
