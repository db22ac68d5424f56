"""Where a step's time goes: every kernel of decode and mixed steps of the CUDA backend, as JSON and as a table.

    PYTHONPATH=kernels:services/common:services/engine:clients/python:proto/gen \
        python benchmarks/profile_step.py --shape llama2-7b --adapters 200 --out benchmarks/results

Random weights; the steps are made by hand, so nothing but the runner is in them. Each is launched three times, then once
under the profiler (CUPTI), then timed without it: the profiler stretches gaps, so `wall` of the table is an upper bound
and `step` is the time to compare.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from loraplex_engine.cuda.random_weights import RandomWeights
from loraplex_engine.cuda.runner import CudaRunner, CudaRunnerConfig
from loraplex_engine.step import NO_ADAPTER, StepPlan

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "lib"))

from loraplex_bench.kernel_table import StepProfile, markdown, read_trace, rows, summarise  # noqa: E402
from loraplex_bench.results import Results, Row, head_commit  # noqa: E402
from loraplex_bench.rig import VALUE_STD  # noqa: E402
from loraplex_bench.shapes import LLAMA2_7B, LLAMA3_8B, TARGETS, AdapterFamily, Shape  # noqa: E402
from loraplex_bench.steps import StepSize, make_plan  # noqa: E402

DEVICE = torch.device("cuda", 0)
TIMED_STEPS = 20


class StepBench:
    """A runner with adapters behind the pages of its steps' sequences."""

    def __init__(self, shape: Shape, family: AdapterFamily, num_adapters: int, sizes: list[StepSize]) -> None:
        self.shape = shape
        self._kv_pages = max(size.num_pages(shape.pool) for size in sizes)
        tokens = max(size.num_decode + size.num_prompts * size.prompt_tokens for size in sizes)
        config = CudaRunnerConfig(
            info=shape.info,
            geometry=shape.pool,
            num_pages=self._kv_pages + family.total_pages(shape, num_adapters),
            max_num_seqs=max(size.num_rows for size in sizes),
            max_model_len=1280,
            max_num_batched_tokens=tokens,
            max_resident_adapters=max(num_adapters, 1),
        )
        self.runner = CudaRunner(config, RandomWeights(dtype=torch.bfloat16, device=DEVICE))
        self._step_id = 0
        self._load(family, num_adapters)

    def _load(self, family: AdapterFamily, num_adapters: int) -> None:
        begin, page_bytes = self._kv_pages, self.shape.geometry.page_bytes
        for index in range(num_adapters):
            pages = np.arange(begin, begin + family.num_pages(self.shape, index), dtype=np.int32)
            begin += len(pages)
            values = torch.empty(len(pages) * page_bytes // 2, dtype=torch.bfloat16, device=DEVICE)
            image = values.normal_(0, VALUE_STD).view(torch.uint8).view(len(pages), page_bytes).cpu().numpy()
            handle = self.runner.load_adapter(index, family.spec(self.shape, index), pages, image)
            while not handle.is_done():
                time.sleep(0.001)

    def plan(self, size: StepSize, num_adapters: int) -> StepPlan:
        """Return a step whose rows go round that many adapters."""
        self._step_id += 1
        rows = np.arange(size.num_rows, dtype=np.int32)
        adapters = rows % num_adapters if num_adapters else np.full_like(rows, NO_ADAPTER)
        return make_plan(size, self.shape.pool, adapters, step_id=self._step_id)

    def profile(self, name: str, size: StepSize, num_adapters: int) -> StepProfile:
        """Return the kernels of one step."""
        for _ in range(3):
            self.runner.launch(self.plan(size, num_adapters)).wait()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self.runner.launch(self.plan(size, num_adapters)).wait()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return summarise(name, read_trace(path))

    def step_ms(self, size: StepSize, num_adapters: int) -> tuple[float, float]:
        """Return (milliseconds per step with two in flight, median of the host's part)."""
        plans = [self.plan(size, num_adapters) for _ in range(TIMED_STEPS)]
        self.runner.launch(plans[0]).wait()
        host_s, in_flight = list[float](), []
        begin_s = time.perf_counter()
        for plan in plans[1:]:
            launched_s = time.perf_counter()
            in_flight.append(self.runner.launch(plan))
            host_s.append(time.perf_counter() - launched_s)
            if len(in_flight) == 2:
                in_flight.pop(0).wait()
        for handle in in_flight:
            handle.wait()
        return (time.perf_counter() - begin_s) / (len(plans) - 1) * 1e3, statistics.median(host_s) * 1e3


def steps(num_adapters: int, batch: int) -> dict[str, tuple[StepSize, int]]:
    """Return name -> (size, adapters) of what is profiled."""
    decode = StepSize(num_decode=batch)
    mixed = StepSize(num_decode=batch - 31, num_prompts=31)  # about the baselines' 8192 batched tokens
    found = {
        f"decode, {batch} x {decode.context}, no adapter": (decode, 0),
        f"decode, {batch} x {decode.context}, 1 adapter": (decode, min(1, num_adapters)),
        f"decode, {batch} x {decode.context}, {num_adapters} adapters": (decode, num_adapters),
        f"decode, 1 x {decode.context}, 1 adapter": (replace(decode, num_decode=1), min(1, num_adapters)),
    }
    for count in (0, num_adapters):
        name = f"mixed, {mixed.num_decode} x {mixed.context} + {mixed.num_prompts} x {mixed.prompt_tokens}"
        found[f"{name}, {count or 'no'} adapters"] = (mixed, count)
    return found


def main() -> None:
    shapes = {shape.name: shape for shape in (LLAMA2_7B, LLAMA3_8B)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(shapes), default="llama2-7b")
    parser.add_argument("--targets", choices=list(TARGETS), default="qkvo")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256, help="decode rows, more than 31")
    parser.add_argument("--out", type=Path, help="folder for the result file and the table")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    family, results = AdapterFamily(targets=args.targets, ranks=tuple(args.ranks)), Results()
    wanted = steps(args.adapters, args.batch)
    bench = StepBench(shapes[args.shape], family, args.adapters, [size for size, _ in wanted.values()])
    results.note(f"{len(bench.runner.graphs)} graphs captured in {bench.runner.graphs.capture_s:.2f} s")
    tables = []
    for name, (size, num_adapters) in wanted.items():
        case = f"{args.shape}/{family.name}/{name}"
        profile = bench.profile(case, size, num_adapters)
        total_ms, host_ms = bench.step_ms(size, num_adapters)
        results.rows += rows(profile)
        results.add(Row(suite="profile", case=case, metric="step", value=total_ms, unit="ms"))
        results.add(Row(suite="profile", case=case, metric="host", value=host_ms, unit="ms"))
        tables.append(markdown(profile))
        print(tables[-1], flush=True)
    bench.runner.close()
    if args.out:
        path = results.write(args.out, f"profile-{args.shape}", commit=args.commit)
        path.with_suffix(".md").write_text("\n".join(tables))


if __name__ == "__main__":
    main()
