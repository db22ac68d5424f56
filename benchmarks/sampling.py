"""Times sampling a step's rows on the GPU: our kernel by kind of row, its floor, and the torch sampler.

    python benchmarks/sampling.py --out benchmarks/results

The floor is one read of the logits at 3.35 TB/s. Kernel: median of 15 launches, L2 evicted by reading 160 MiB before
each. The torch sampler is timed by the host, end to end, since it waits for the device. Logits are bf16, normal around 0:
"peaked" with deviation 3 as a model's, "flat" with 0.02 as random weights', the worst case of top_p.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_bench.results import Results, Row, head_commit
from loraplex_engine.runners.cuda.sampling import DeviceSampler
from loraplex_engine.runners.sampler import Sampler
from loraplex_engine.step import SamplingArrays, SlotSetup
from loraplex_kernels.module import KernelLibrary
from loraplex_kernels.sampling.sample import ROW_INTS

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent

DEVICE = torch.device("cuda", 0)
BYTES_PER_US = 3.35e6
REPEATS = 15
DEVIATIONS = {"peaked": 3.0, "flat": 0.02}
KINDS: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top_k 50, top_p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "penalties": {"frequency_penalty": 0.2, "repetition_penalty": 1.1},
    "20 probabilities": {"num_logprobs": 20},
}


def arrays_of(rows: int, fields: dict[str, float]) -> SamplingArrays:
    """Return the same draw for every row, with seeds of their own."""
    defaults = {"top_p": 1.0, "repetition_penalty": 1.0, "num_logprobs": -1.0} | fields

    def column(name: str, dtype: type[np.generic]) -> np.ndarray:
        return np.full(rows, defaults.get(name, 0.0)).astype(dtype)

    return SamplingArrays(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        presence_penalty=column("presence_penalty", np.float32),
        frequency_penalty=column("frequency_penalty", np.float32),
        seed=np.arange(rows, dtype=np.uint64),
        position=column("position", np.int32),
        num_logprobs=column("num_logprobs", np.int32),
        ban_stops=column("ban_stops", np.bool_),
    )


def time_device_us(call: Callable[[], object], flush: torch.Tensor) -> float:
    """Median time on the device of one call."""
    times: list[float] = []
    for index in range(REPEATS + 2):
        flush.sum()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times)


def time_host_us(call: Callable[[], object]) -> float:
    """Median time of one call with the device idle before and after."""
    times: list[float] = []
    for index in range(5):
        torch.cuda.synchronize()
        begin_s = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if index:
            times.append((time.perf_counter() - begin_s) * 1e6)
    return statistics.median(times)


def run_case(rows: int, vocab: int, shape: str, kind: str, library: KernelLibrary, flush: torch.Tensor) -> list[float]:
    """Return microseconds: our kernel, our kernel with the host's part, the torch sampler."""
    logits = (torch.randn(rows, vocab, device=DEVICE) * DEVIATIONS[shape]).to(torch.bfloat16)
    slots, arrays, none = np.arange(rows, dtype=np.int32), arrays_of(rows, KINDS[kind]), np.zeros(0, np.int32)
    ours = DeviceSampler(library, vocab_size=vocab, num_slots=rows, max_rows=rows)
    torchs = Sampler(vocab_size=vocab, device=DEVICE)
    if kind == "penalties":
        rng = np.random.default_rng(0)
        for slot in range(rows):
            prompt = rng.integers(0, vocab, 512).astype(np.int32)
            setup = SlotSetup(slot=slot, prompt_token_ids=prompt, output_token_ids=none, uses_penalties=True)
            ours.occupy(setup)
            torchs.occupy(setup)
    drawn = torch.zeros((2, rows), dtype=torch.int32, device=DEVICE)
    last = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    report = ours.sample(logits, slots, arrays, drawn, last)
    truth = torchs.sample(logits, slots, arrays).token_ids
    if not torch.equal(drawn[0].long(), truth):
        raise RuntimeError(f"{kind}: {int((drawn[0] != truth).sum())} of {rows} rows differ from the torch sampler's")
    fixed = torch.from_numpy(ours.pack_rows(slots, arrays).view(np.int32)).to(DEVICE).view(rows, ROW_INTS)
    buffers = ours.device_rows()
    return [
        time_device_us(lambda: ours.kernel.launch(logits, fixed, drawn, last, **buffers, report=report), flush),
        time_device_us(lambda: ours.sample(logits, slots, arrays, drawn, last), flush),
        time_host_us(lambda: torchs.sample(logits, slots, arrays)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--commit", default="", help="for checkouts without git")
    args = parser.parse_args()
    library, flush = KernelLibrary(DEVICE, torch.bfloat16), torch.zeros(40 << 20, device=DEVICE)
    results = Results()
    results.print_head()
    for rows, vocab, shape, kind in itertools.product(args.rows, args.vocab, DEVIATIONS, KINDS):
        kernel, launched, peer = run_case(rows, vocab, shape, kind, library, flush)
        for metric, value in (("kernel", kernel), ("launched", launched)):
            results.add(
                Row(
                    suite="sampling",
                    case=f"{rows}/{vocab}/{shape}/{kind}",
                    metric=metric,
                    value=value,
                    unit="us",
                    floor=rows * vocab * 2 / BYTES_PER_US,
                    peer="torch sampler",
                    peer_value=peer,
                )
            )
    results.write(args.out, "sampling", commit=args.commit or head_commit())


if __name__ == "__main__":
    main()
