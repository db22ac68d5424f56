"""The engine in this process on the workloads of baselines/end_to_end.csv, beside vLLM's figures and the floor.

    python benchmarks/engine.py bursts-7b slora-7b --out benchmarks/results

Random weights, no files. Adapters are in the pinned host arena before the clock starts, each with values of its own,
and none is on the device unless a line says so. ``--list`` names the cases; one run writes one JSON file. Cases of the
same model share its weights, cases of the same limits the engine: name them one after the other. ``--smoke`` runs every
kind of case on a tiny model and the torch backend, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_bench.end_to_end.cases import gpu_cases, setup_of
from loraplex_bench.end_to_end.context import Bench
from loraplex_bench.end_to_end.smoke_cases import smoke_cases
from loraplex_bench.end_to_end.startup import first_token
from loraplex_bench.results import head_commit
from loraplex_bench.shapes import LLAMA2_7B, LLAMA3_8B, LLAMA3_8B_FP8, AdapterFamily, Shape

if TYPE_CHECKING:
    from loraplex_bench.rig import RigSetup
    from loraplex_engine.model.weights import WeightSource

VLLM_LIMITS = (
    "the peer's limits: vLLM 0.26.0, at most 256 sequences, 8192 batched tokens, max_model_len 1280, memory share 0.90; "
    "its adapters were in host memory at t = 0"
)


def startup_child(args: argparse.Namespace) -> None:
    """Start one engine and print where the time went; the parent reads the last line."""
    weights: WeightSource | None = None
    if args.files is not None:
        setup, weights = setup_of_files(args.files)
    elif args.model_dir is not None:
        from loraplex_common.base_model import load_base_model

        info = load_base_model(args.model_dir, name="tiny")
        shape = Shape(info=info, pool_gib=2**-9, dtype="float32", model_dir=args.model_dir)
        setup = setup_of(
            shape, AdapterFamily(ranks=(4,)), 0, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64
        )
    else:
        setup = setup_of(
            {shape.name: shape for shape in (LLAMA2_7B, LLAMA3_8B)}[args.startup_child], AdapterFamily(), 0
        )
    found = first_token(setup, weights or Bench().weights(setup.shape), started_at_s=args.started_at)
    print(json.dumps(found), flush=True)


def setup_of_files(folder: Path) -> tuple[RigSetup, WeightSource]:
    """Return an engine of an FP8 checkpoint as a start makes it: its files are hashed, and read when it is built."""
    import torch
    from loraplex_common.base_model import load_base_model
    from loraplex_engine.model.weight_form import WeightForm
    from loraplex_engine.model.weights import WeightReader

    shape = replace(LLAMA3_8B_FP8, info=load_base_model(folder, name=LLAMA3_8B_FP8.name))
    device = torch.device("cuda", 0)
    weights = WeightReader(folder, dtype=torch.bfloat16, device=device, form=WeightForm.FP8)
    return setup_of(shape, AdapterFamily(), 0), weights


def smoke_model(folder: Path) -> Path:
    """Write the tiny model that the tests use."""
    from support.base_models import TinyBase, write_base_model

    return write_base_model(folder / "tiny", TinyBase())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--list", action="store_true", help="name the cases with their times")
    parser.add_argument("--smoke", action="store_true", help="every kind of case on a tiny model, without a GPU")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    parser.add_argument("--repeats", type=int, default=1, help="bursts of each row; the median counts")
    parser.add_argument("--independent", action="store_true", help="no programmatic dependent launch")
    for hidden, kind in (("--startup-child", str), ("--started-at", float), ("--model-dir", Path), ("--files", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.startup_child:
        startup_child(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        cases = smoke_cases(smoke_model(Path(folder))) if args.smoke else gpu_cases()
        names = args.cases or (list(cases) if args.smoke else [])
        unknown = sorted(set(names) - set(cases))
        if args.list or unknown or not names:
            for name, case in cases.items():
                print(f"{name:<18} {case.seconds:>4} s  {case.about}")
            sys.exit(f"no such case: {', '.join(unknown)}" if unknown else 0)
        bench = Bench(repeats=args.repeats, dependent_launch=False if args.independent else None)
        bench.results.note(VLLM_LIMITS)
        bench.results.print_head()
        try:
            for name in names:
                began_s = time.perf_counter()
                cases[name].run(bench)
                print(f"  # {name}: {time.perf_counter() - began_s:.1f} s", flush=True)
        finally:
            bench.release()
            if args.out and bench.results.rows:  # what was measured before a failure is not lost
                bench.results.write(args.out, "engine", commit=args.commit)


if __name__ == "__main__":
    main()
