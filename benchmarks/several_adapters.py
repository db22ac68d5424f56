"""What several adapters per row, and ranks above 256, cost in steps of Llama-2-7B on one GPU, attention and sampling included.

    python benchmarks/several_adapters.py --out benchmarks/results     # one H200: about 120 s
    python benchmarks/several_adapters.py --smoke                      # no GPU: a tiny model, nothing is timed

Random weights; 64 rows at a context of 320, two steps in flight, medians of 60 steps. LoRA of rank 16 on all seven projections:
64 rows with three weighted adapters each, 192 different ones, against three runs of 64 rows with one of them each, and
against 192 rows with one each; what adapters add is a step's time less that of as many rows without. Plain LoRA at 1, 32, 64 rows
too: to be compared with the same rows of another commit. Prompts: one of 256 tokens beside the rows, launched kernel by
kernel. Rank 512 alone, and four beside rank 16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_bench.results import Results, head_commit
from loraplex_bench.shapes import LLAMA2_7B
from loraplex_bench.steps.kind_measurement import tiny_shape
from loraplex_bench.steps.several_bench import ROWS, DryListSteps, ListBench, ListMeasurement

if TYPE_CHECKING:
    from loraplex_bench.steps.several_bench import ListSteps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, plans only, no GPU")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    shape, rows, results = (tiny_shape(), 8, Results()) if args.smoke else (LLAMA2_7B, ROWS, Results())
    steps: ListSteps
    if args.smoke:
        steps = DryListSteps(shape, rows)
    else:
        bench = ListBench(shape, rows)
        results.note(f"{len(bench.runner.graphs)} graphs captured in {bench.runner.graphs.capture_s:.2f} s")
        steps = bench
    results.print_head()
    ListMeasurement(steps, results, shape, rows).run()
    if args.out:
        results.write(args.out, "several-adapters", commit=args.commit)


if __name__ == "__main__":
    main()
