"""Where a step's time goes: every kernel of decode and mixed steps of the CUDA backend, as JSON and as a table.

    python benchmarks/profile_step.py --shape llama2-7b --adapters 200 --out benchmarks/results

Random weights; the steps are made by hand, so nothing but the runner is in them. Each is launched three times, then once
under the profiler (CUPTI), then timed without it: the profiler stretches gaps, so `wall` of the table is an upper bound
and `step` is the time to compare.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from loraplex_bench.base_shapes import BF16_SHAPES, FP8_SHAPES
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.shapes import LLAMA2_7B, TARGETS, AdapterFamily, Shape
from loraplex_bench.steps.kernel_table import markdown, rows
from loraplex_bench.steps.plan import StepSize
from loraplex_bench.steps.step_bench import StepBench


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


def name_of(shape: Shape) -> str:
    """Return what the command line calls a shape."""
    return f"{shape.name} {shape.form}".strip().replace(" ", "-").lower()


def main() -> None:
    shapes = {name_of(shape): shape for shape in (LLAMA2_7B, *BF16_SHAPES, *FP8_SHAPES)}
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
