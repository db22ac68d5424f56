"""What LoRA adds to a decode step: all products and pointwise kernels of Llama-2-7B, attention and sampling left out.

    python benchmarks/layers.py --out benchmarks/results

`decode_stack`: r16 on all seven projections, one graph per step, no flush (13 GB of weights evict L2); `products` are the
dense products alone, as the baselines' base; `added` is the step with LoRA minus the same step without, RoPE, norms and
SiLU on both sides, because ours folds LoRA into them. Every layer has weights of its own. `in_place`: one product and
its follower in 32 layers, one graph, L2 evicted by reading 160 MiB before each replay, per layer.
Two warm-ups, medians of 9 and 15 replays. Before timing, the step with LoRA must differ from the step without.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from loraplex_bench.popularity import baseline_adapters
from loraplex_bench.random_weights import RandomWeights
from loraplex_bench.results import Results, head_commit
from loraplex_bench.shapes import LLAMA2_7B, AdapterFamily
from loraplex_bench.steps.layer_cases import measure_ops, measure_stack
from loraplex_bench.steps.stack import DecodeStack, StackAdapters
from loraplex_kernels.module import KernelLibrary

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda", 0)
MAX_ROWS = 256
FLUSH_BYTES = 160 << 20


class GraphTimer:
    """Times replays of a CUDA graph of one call.

    Args:
        replays: How many count, after two that do not.
        flush: Evict L2 before each.
    """

    def __init__(self, replays: int, *, flush: bool) -> None:
        self._replays = replays
        self._stream = torch.cuda.Stream(DEVICE)  # type: ignore[no-untyped-call]
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=DEVICE) if flush else None

    def __call__(self, run: Callable[[], None]) -> float:
        """Return the median, microseconds."""
        torch.cuda.synchronize()  # items of the batch were sent on another stream
        with torch.cuda.stream(self._stream):
            run()  # loads kernels, lets cuBLAS make its workspaces
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()
        times = []
        with torch.cuda.stream(self._stream):
            for index in range(self._replays + 2):
                if self._flush is not None:
                    self._flush.sum()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                graph.replay()
                stop.record()
                stop.synchronize()
                if index >= 2:
                    times.append(start.elapsed_time(stop) * 1e3)
        return float(statistics.median(times))


def require_an_effect(stack: DecodeStack, adapters: StackAdapters) -> None:
    """Raise RuntimeError if logits with adapters are those without."""
    path = adapters.use(baseline_adapters(MAX_ROWS, "distinct"))
    stack.run(MAX_ROWS, stack.base)
    base = stack.decoder.work.logits.clone()
    stack.run(MAX_ROWS, path)
    difference = (stack.decoder.work.logits - base).abs().amax(dim=1)
    if not bool((difference > 0).all()):
        raise RuntimeError("LoRA changes nothing in some row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=("stack", "in-place"), default=["stack", "in-place"])
    parser.add_argument("--independent", action="store_true", help="no programmatic dependent launch")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    torch.cuda.set_device(DEVICE)
    num_sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    library = KernelLibrary(DEVICE, torch.bfloat16, dependent=not args.independent)
    results = Results()
    with torch.inference_mode():
        weights = RandomWeights(dtype=torch.bfloat16, device=DEVICE)
        stack = DecodeStack(LLAMA2_7B, library, weights, max_rows=MAX_ROWS)
        stack.fill()
        adapters = StackAdapters(stack, AdapterFamily(targets="all"), MAX_ROWS, num_sms=num_sms)
        require_an_effect(stack, adapters)
        results.print_head()
        if "stack" in args.suites:
            measure_stack(results, stack, adapters, GraphTimer(9, flush=False))
        if "in-place" in args.suites:
            wide = StackAdapters(stack, AdapterFamily(ranks=(64,)), 64, num_sms=num_sms)
            measure_ops(results, stack, {16: adapters, 64: wide}, GraphTimer(15, flush=True))
    if args.out:
        results.write(args.out, "layers", commit=args.commit)


if __name__ == "__main__":
    main()
