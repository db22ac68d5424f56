"""Decode steps of tensor-parallel groups: tokens/s per degree, what LoRA adds per degree, and both splits of adapters.

    python benchmarks/tensor_parallel.py            # GPUs: refused by name, until the CUDA backend has a runner for groups
    python benchmarks/tensor_parallel.py --floors   # no GPU: what bounds 7B, 13B and 70B on H100s; nothing is measured
    python benchmarks/tensor_parallel.py --smoke    # no GPU: a tiny model, 1 and 2 processes over gloo: about 40 s on 2 cores

Each row has an adapter of its own on all seven projections. `step` is a decode step without adapters, `added` the step with them
less the step without, medians; on a host that has less than a core for each process they say nothing. `in collectives` is the part of a step that rank 0 spends in them, waiting for others included.
`floor`: each rank's bytes at its memory's rate, and the collectives (`loraplex_bench.ranks.floor`); before it is used for several
ranks, it is held beside steps that were measured on one GPU. Links and latencies between GPUs are the simulator's: a data sheet's and
assumed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch
from loraplex_bench.ranks.floor import H100_RATES, RankFloor, checked_floors
from loraplex_bench.ranks.group_bench import CONTEXT, DTYPE, GroupSetup, StepTime, running_group
from loraplex_bench.results import Results, Row, head_commit
from loraplex_common.base_model import load_base_model
from loraplex_engine.config import ConfigError
from loraplex_engine.rank_split import CPU_RATES, PairSplit
from loraplex_engine.ranks.degree import checked_degree
from loraplex_engine.simulation.shapes import ModelShape, ShapeError, base_model
from support.base_models import TinyBase, write_base_model

SHAPES: Final = ("llama2-7b", "llama2-13b", "llama3-70b")
DEGREES: Final = (1, 2, 4, 8)
RANKS: Final = (8, 16, 32, 64, 128, 256)
ROWS: Final = (1, 8, 32, 64, 128, 256)
GPU_CONTEXT: Final = 320
SMOKE_DEGREES: Final = (1, 2)
SMOKE_RANKS: Final = (8, 64)
SMOKE_ROWS: Final = (1, 4)
SMOKE_STEPS: Final = 20
SUITE: Final = "tensor_parallel"


def print_floors(results: Results) -> None:
    """Add the floors of all shapes, behind the check of the formula on one GPU."""
    results.note("one GPU: measured steps of Llama-2-7B beside the floor of a group of one, H100")
    for found in checked_floors():
        results.add(_row(found.case, "step", found.measured_s * 1e3, "ms", found.floor_s * 1e3))
    latency_us, link = H100_RATES.latency_s * 1e6, H100_RATES.link_bytes_per_s / 1e9
    results.note(
        f"groups: nothing below is measured; {link:.0f} GB/s of a data sheet, {latency_us:.0f} us a collective assumed"
    )
    for name in SHAPES:
        for degree in DEGREES:
            _add_floors(results, RankFloor(ModelShape(base_model(name), tp_degree=degree), H100_RATES))


def _add_floors(results: Results, floor: RankFloor) -> None:
    degree = floor.shape.tp_degree
    for rows in ROWS:
        case, step_s = f"{floor.shape.info.name}/{_ranks(degree)}/{rows} rows", floor.step_s(rows, GPU_CONTEXT)
        results.add(_row(case, "floor of step", step_s * 1e3, "ms"))
        results.add(_row(case, "bound of out", rows / step_s, "tok/s"))
        for rank in RANKS:
            for split in _splits(degree):
                added_s = floor.lora_s(rows, rank, split)
                results.add(_row(f"{case}/r{rank}/{split.value}", "floor of added", added_s * 1e3, "ms"))


def smoke(results: Results, directory: Path) -> None:
    """Measure groups of a tiny model."""
    torch.set_num_threads(1)
    model = write_base_model(directory / "tiny", TinyBase())
    for degree in SMOKE_DEGREES:
        info = load_base_model(model)
        floor = RankFloor(
            ModelShape(info, DTYPE, tp_degree=checked_degree(degree, info, torch.device("cpu"))), CPU_RATES
        )
        for split in _splits(degree):
            setup = GroupSetup(
                model=model, degree=degree, max_rows=max(SMOKE_ROWS), lora_ranks=SMOKE_RANKS, pair_split=split
            )
            with running_group(setup) as bench:
                for rows in SMOKE_ROWS:
                    _add_times(results, floor, rows, split, bench.times(rows, SMOKE_STEPS))


def _add_times(results: Results, floor: RankFloor, rows: int, split: PairSplit, times: list[StepTime]) -> None:
    """Add what was measured of steps of so many rows: without adapters (once), then of each LoRA rank."""
    case, floor_s = f"tiny/{_ranks(floor.shape.tp_degree)}/{rows} rows", floor.step_s(rows, CONTEXT)
    base, *adapted = times
    if split is PairSplit.WHOLE:
        results.add(_row(case, "step", base.step_s * 1e6, "us", floor_s * 1e6))
        results.add(_row(case, "out", rows / base.step_s, "tok/s", rows / floor_s))
    for rank, lora in zip(SMOKE_RANKS, adapted, strict=True):
        with_rank, added_s = f"{case}/r{rank}/{split.value}", floor.lora_s(rows, rank, split)
        results.add(_row(with_rank, "added", (lora.step_s - base.step_s) * 1e6, "us", added_s * 1e6))
        results.add(_row(with_rank, "out", rows / lora.step_s, "tok/s", rows / (floor_s + added_s)))
        if floor.shape.tp_degree > 1:
            results.add(_row(with_rank, "in collectives", lora.collective_s * 1e6, "us"))


def check_gpus() -> None:
    """Refuse what no engine does yet.

    Raises:
        ConfigError: If so; the message says what is missing.
    """
    for name in SHAPES:
        for degree in DEGREES:
            if degree > 1:
                checked_degree(degree, base_model(name), torch.device("cuda"))
    raise ConfigError(
        "engines of several GPUs are there, but this benchmark has no rig for them yet: only --floors and --smoke run"
    )


def _splits(degree: int) -> tuple[PairSplit, ...]:
    return (PairSplit.WHOLE,) if degree == 1 else tuple(PairSplit)


def _ranks(degree: int) -> str:
    return f"{degree} rank{'s' if degree > 1 else ''}"


def _row(case: str, metric: str, value: float, unit: str, floor: float | None = None) -> Row:
    return Row(suite=SUITE, case=case, metric=metric, value=value, unit=unit, floor=floor)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--smoke", action="store_true", help="a tiny model on CPUs over gloo")
    what.add_argument("--floors", action="store_true", help="floors of the large shapes; nothing is measured")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    results = Results()
    try:
        if not args.smoke and not args.floors:
            check_gpus()
        results.print_head()
        if args.floors:
            print_floors(results)
        else:
            with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as directory:
                smoke(results, Path(directory))
    except (ConfigError, ShapeError) as error:
        print(f"not measured: {error}", file=sys.stderr)
        return 2
    if args.out:
        results.write(args.out, "tensor-parallel", commit=args.commit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
