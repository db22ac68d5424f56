"""Times a decode step of 16 rows on one CPU thread: the base alone, and five adapters mixed.

    python benchmarks/runner_step.py --model ~/.cache/loraplex/models/SmolLM2-135M-Instruct [--profile]

Greedy, fp32, no server: what `TorchRunner` costs by itself. Rows start with the golden prompts and decode together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_canonical
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.adapter_image import pack
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.step import NO_ADAPTER
from support.plans import Harness

ROOT = Path(__file__).resolve().parent.parent

ADAPTERS = ("json", "devil", "kjv", "upper", "sentiment")
NUM_ROWS = 16
NUM_PAGES = 400


def load_adapters(harness: Harness, runner: TorchRunner, info: BaseModelInfo) -> list[int]:
    indices = []
    for name in ADAPTERS:
        directory = ROOT / "examples" / "demo" / "adapters" / name
        config = (directory / "adapter_config.json").read_bytes()
        form = canonicalise(read_checkpoint(config, (directory / "adapter_model.safetensors").read_bytes(), info))
        adapter = read_canonical(b"".join(form.chunks()), form.revision)
        indices.append(harness.load(adapter.spec, pack(runner.geometry, adapter.spec, adapter.tensors)))
    return indices


def decode(harness: Harness, prompts: list[list[int]], adapters: list[int], num_steps: int) -> list[float]:
    """Return the seconds of each decode step."""
    sequences = [harness.add(prompt, adapter=adapter) for prompt, adapter in zip(prompts, adapters, strict=True)]
    harness.step(sequences)
    times = []
    for _ in range(num_steps):
        plan = harness.plan(sequences)
        begin = time.perf_counter()
        result = harness.runner.launch(plan).wait()
        times.append(time.perf_counter() - begin)
        harness.absorb(sequences, result)
    harness.release(sequences)
    return times


def profile(harness: Harness, prompts: list[list[int]], adapters: list[int]) -> str:
    """Return a table of the operators that eight decode steps spend their time in."""
    with torch.profiler.profile() as profiler:
        decode(harness, prompts, adapters, 8)
    averages = profiler.key_averages()
    return str(averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    info = load_base_model(args.model)
    geometry = choose_pool_geometry(info, dtype="float32")
    torch.set_num_threads(1)
    limits = EngineLimits(
        pool=geometry, num_pages=NUM_PAGES, max_num_seqs=NUM_ROWS * 2 * (args.rounds + 1), max_model_len=2048
    )
    runner = TorchRunner(
        RunnerConfig(info=info, limits=limits),
        WeightReader(args.model, dtype=torch.float32, device=torch.device("cpu")),
    )
    harness = Harness(runner, geometry, NUM_PAGES)
    indices = load_adapters(harness, runner, info)
    cases = json.loads((ROOT / "examples" / "demo" / "golden.json").read_text())["cases"]
    prompts = [case["prompt_ids"] for case in cases[:NUM_ROWS]]
    settings = {
        "base": [NO_ADAPTER] * NUM_ROWS,
        "5 adapters": [indices[row % len(indices)] for row in range(NUM_ROWS)],
    }
    for _ in range(args.rounds):
        for name, adapters in settings.items():
            times = decode(harness, prompts, adapters, args.steps)
            low, median = min(times) * 1e3, statistics.median(times) * 1e3
            print(f"{name}: step {median:.1f} ms median, {low:.1f} ms best, {NUM_ROWS / median * 1e3:.0f} tokens/s")
    if args.profile:
        for name, adapters in settings.items():
            print(name, profile(harness, prompts, adapters))
    runner.close()


if __name__ == "__main__":
    main()
