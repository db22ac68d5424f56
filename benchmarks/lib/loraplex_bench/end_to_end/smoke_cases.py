"""Every kind of case of ``benchmarks/engine.py`` on a tiny model, without a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from loraplex_client.workload import SloraParams

from loraplex_bench.end_to_end.base_shapes import run_shapes
from loraplex_bench.end_to_end.bursts import BurstSize, run_bursts, run_registered
from loraplex_bench.end_to_end.cases import ENGINE_SCRIPT, Case, setup_of
from loraplex_bench.end_to_end.pairs import run_pairs
from loraplex_bench.end_to_end.rates import run_rates
from loraplex_bench.end_to_end.startup import run_startup, run_startup_of_files
from loraplex_bench.end_to_end.traces import run_no_cliff, run_slora
from loraplex_bench.shapes import AdapterFamily, Shape

if TYPE_CHECKING:
    from pathlib import Path


def smoke_cases(model_dir: Path) -> dict[str, Case]:
    """Return every kind of case on a tiny model of files and the torch backend, for machines without a GPU."""
    from loraplex_common.base_model import load_base_model

    tiny = Shape(info=load_base_model(model_dir, name="tiny"), pool_gib=2**-9, dtype="float32", model_dir=model_dir)
    few = AdapterFamily(ranks=(4,))
    size = BurstSize(num_requests=12, prompt_tokens=8, output_tokens=3)
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64}
    standard = setup_of(tiny, few, 6, **sizes)
    trace = SloraParams(num_adapters=6, rate=20, duration_s=1, prompt_range=(2, 16), output_range=(2, 8))
    pairs, two = replace(standard, num_adapters=3), (standard, standard.with_limits(max_num_seqs=4))
    command = [sys.executable, str(ENGINE_SCRIPT), "--startup-child", "tiny", "--model-dir", str(model_dir)]
    about = "tiny model, torch backend"
    return {
        "bursts": Case(about=about, seconds=1, run=lambda b: run_bursts(b, standard, (0, 1, 6), size=size)),
        "registered": Case(about=about, seconds=1, run=lambda b: run_registered(b, standard, few=2, size=size)),
        "slora": Case(about=about, seconds=2, run=lambda b: run_slora(b, standard, trace, warm=size, cutoff_s=30)),
        "lora-off": Case(about=about, seconds=1, run=lambda b: run_pairs(b, pairs, size=size, num_pairs=2)),
        "no-cliff": Case(
            about=about,
            seconds=3,
            run=lambda b: run_no_cliff(b, standard, num_resident=2, size=size, duration_s=0.5),
        ),
        "rates": Case(
            about=about,
            seconds=3,
            run=lambda b: run_rates(b, standard, (10.0,), duration_s=1, warm=size, lengths=(2, 8), cutoff_s=30),
        ),
        "shapes": Case(about=about, seconds=2, run=lambda b: run_shapes(b, two, (0, 6), size=size, decoding=size)),
        "startup": Case(about=about, seconds=20, run=lambda b: run_startup(b, "tiny", command, peer_s=None)),
        "startup-files": Case(
            about=about,
            seconds=20,
            run=lambda b: run_startup_of_files(b, tiny.info, command[:-2], "--model-dir", device=torch.device("cpu")),
        ),
    }
