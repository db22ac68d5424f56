"""Times single steps on the GPU, from which the simulator's step costs are fitted (docs/adr/0016-simulator.md).

    python benchmarks/calibrate.py --shape llama2-7b --out benchmarks/results

Random weights, hand-made steps, two in flight. Decode rows and whole prompts, without and with adapters, on q,k,v,o and on
all projections; about two minutes. The model must not be one that the simulator is tested on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.shapes import LLAMA2_7B, LLAMA3_8B, TARGETS, AdapterFamily
from loraplex_bench.steps.plan import StepSize
from loraplex_bench.steps.step_bench import StepBench

MAX_ADAPTERS = 128
DECODE = tuple(StepSize(num_decode=rows, context=context) for rows in (1, 8, 64, 256) for context in (64, 320))
PREFILL = tuple(
    StepSize(num_decode=0, num_prompts=prompts, prompt_tokens=tokens)
    for prompts, tokens in ((1, 64), (1, 256), (4, 256), (32, 256), (2, 1024))
)


def case_of(size: StepSize, num_adapters: int) -> str:
    """Return how the simulator reads a step's name."""
    if size.num_decode:
        return f"decode:{size.num_decode}x{size.context}:{num_adapters}"
    return f"prefill:{size.num_prompts}x{size.prompt_tokens}:{num_adapters}"


def measure(bench: StepBench, family: AdapterFamily, results: Results, *, with_base: bool) -> None:
    """Time every size with no adapter, one, and as many as it has rows."""
    for size in (*DECODE, *PREFILL):
        most = min(size.num_rows, MAX_ADAPTERS)
        for num_adapters in sorted({1, most} | ({0} if with_base else set())):
            total_ms, host_ms = bench.step_ms(size, num_adapters)
            case = f"{bench.shape.name}/{family.name}/{case_of(size, num_adapters)}"
            results.add(Row(suite="steps", case=case, metric="step", value=total_ms, unit="ms"))
            results.add(Row(suite="steps", case=case, metric="host", value=host_ms, unit="ms"))


def main() -> None:
    shapes = {shape.name: shape for shape in (LLAMA2_7B, LLAMA3_8B)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(shapes), default="llama2-7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    results = Results()
    results.print_head()
    for index, targets in enumerate(TARGETS):
        family = AdapterFamily(targets=targets, ranks=(args.rank,))
        bench = StepBench(shapes[args.shape], family, MAX_ADAPTERS, [*DECODE, *PREFILL])
        try:
            measure(bench, family, results, with_base=index == 0)
        finally:
            bench.runner.close()
        del bench
    if args.out:
        results.write(args.out, f"steps-{args.shape}", commit=args.commit)


if __name__ == "__main__":
    main()
