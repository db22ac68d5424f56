"""What kinds of adapters cost in a decode step of Llama-2-7B on one GPU, attention and sampling included.

    python benchmarks/adapter_kinds.py --out benchmarks/results     # one H200: about 200 s
    python benchmarks/adapter_kinds.py --smoke                      # no GPU: a tiny model, nothing is timed

Random weights; 64 rows at a context of 320, two steps in flight, medians of 60 steps. `step`: without adapters, of 64
adapters of each kind on all seven projections ((IA)3: k, v, down), and of 16 of each. Plain LoRA at 1, 32, 64 rows too: to
be compared with the same rows of another commit. FLoRA's steps are no graphs; its floor is one pass over W, whose products it
makes besides the base's, and its factors. The last step's adapters are LoRA with a pair on lm_head and 64 rows of the embedding
and of lm_head besides; what that adds to LoRA's step stands beside the time of its bytes. `floor` of SHiRA: 4 bytes per non-zero
at the rate of a copy, added to the step without adapters; `bar` is 1.5 of these bytes and 3 us an op. `p99 while loading`: the
time from token to token of 64
rows of LoRA while 64 DoRA adapters come in, one started per step, against the same rows alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_bench.results import Results, head_commit
from loraplex_bench.shapes import LLAMA2_7B
from loraplex_bench.steps.kind_bench import DrySteps, KindBench
from loraplex_bench.steps.kind_measurement import KINDS, ROWS, Measurement, numbers_of, tiny_shape
from loraplex_bench.steps.part_images import kind_images

if TYPE_CHECKING:
    from loraplex_bench.steps.kind_bench import KindSteps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, loads and plans only, no GPU")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    shape, rows, results = (tiny_shape(), 8, Results()) if args.smoke else (LLAMA2_7B, ROWS, Results())
    images = kind_images(shape.geometry)
    sizes = ", ".join(f"{kind} {image.image.nbytes / 1e6:.1f} MB" for kind, image in images.items())
    results.note(f"one adapter: {sizes}")
    steps: KindSteps
    if args.smoke:
        steps = DrySteps(shape, images, rows * len(KINDS))
    else:
        bench = KindBench(shape, images, numbers_of(rows), rows)
        results.note(f"{len(bench.runner.graphs)} graphs captured in {bench.runner.graphs.capture_s:.2f} s")
        steps = bench
    results.print_head()
    Measurement(steps, results, shape, images, rows).run()
    if args.out:
        results.write(args.out, "adapter-kinds", commit=args.commit)


if __name__ == "__main__":
    main()
