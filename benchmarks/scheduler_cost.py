"""What the scheduler costs the host per steady decode step: schedule + update, nothing computed.

Usage: ``python benchmarks/scheduler_cost.py [--running 256] [--waiting 2000] [--adapters 10000] [--steps 2000]``

Three cases at pipeline depth 2 (one plan in flight): *base* has no adapters and room to spare; *adapters* has one of
thousands of known adapters on each request, and 64 fairness keys; *pressure* besides has a pool full of cached blocks, so
every block that a row grows into has to be taken from what is worth least. Prints the fastest decile, the median and the
99th percentile in microseconds; on a busy machine only the fastest decile says something about the code. The last lines
are the host memory per known adapter and a summary; the exit code is 0 if the median of every case is under 300 us and
the memory under 2 KB.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec
from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.limits import EngineLimits, SchedulingPolicy
from loraplex_engine.loop.engine_state import EngineState
from loraplex_engine.messages import Submission
from loraplex_engine.pool_geometry import PoolGeometry
from loraplex_engine.sampling_params import SamplingParams, StoppingParams
from loraplex_engine.simulation.shapes import ALL_TARGETS
from loraplex_engine.step import StepPlan, StepResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_TOKENS = 16
MAX_MODEL_LEN = 8192
NUM_LAYERS = 32
NUM_KEYS = 64
MOST_MEDIAN_US = 300.0
MOST_ADAPTER_BYTES = 2048


def make_state(arguments: argparse.Namespace, num_pages: int) -> EngineState:
    limits = EngineLimits(
        pool=PoolGeometry(dtype="bfloat16", num_layers=1, num_kv_heads=1, head_dim=64, block_tokens=BLOCK_TOKENS),
        num_pages=num_pages,
        num_arena_slots=max(1, arguments.adapters),
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=arguments.running,
        max_num_batched_tokens=8192,
        max_pass_over_s=1e9,
        eos_token_ids=(2,),
        policy=SchedulingPolicy(growth_quantile=0.0),
    )
    arena = HostArena(limits.num_arena_slots, 1)  # accounts only: no image is ever written
    return EngineState(limits, arena, emit=lambda _event: None, clock=time.monotonic)


def digest_of(number: int) -> str:
    return f"{number:064x}"


def make_spec(number: int) -> AdapterSpec:
    """Return what is known of an adapter of a 7B model: 224 modules, in one of eight recipes."""
    rank = 8 * (1 + number % 8)
    modules = (ModuleSpec.low_rank(layer, name, rank, 2.0) for layer in range(NUM_LAYERS) for name in ALL_TARGETS)
    return AdapterSpec(digest_of(number), tuple(modules))


def know_adapters(state: EngineState, count: int) -> float:
    """Have all adapters asked for and their images arrive; returns bytes of memory per adapter."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(count):
        state.cache.states.count_arrival(digest_of(number))
        slots = state.arena.allocate(1)
        assert slots is not None
        state.cache.image_arrived(make_spec(number), slots)
    state.cache.states.take_changed()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / max(1, count)


def submit(state: EngineState, count: int, num_adapters: int) -> None:
    rng = np.random.default_rng(0)
    for slot in range(count):
        state.scheduler.submit(
            Submission(
                session_id=1 + slot % 2,
                session_slot=slot,
                request_id=str(slot),
                prompt_token_ids=rng.integers(3, 100, size=int(rng.integers(1, 200))).astype(np.int32),
                resumed_token_ids=np.empty(0, dtype=np.int32),
                sampling=SamplingParams(),
                stopping=StoppingParams(max_new_tokens=MAX_MODEL_LEN - 256, stop_token_ids=(0, 1)),
                adapter_digest=digest_of(int(rng.integers(num_adapters))) if num_adapters else None,
                fairness_key=str(slot % NUM_KEYS) if num_adapters else "",
            )
        )


def fill_with_cached_blocks(state: EngineState) -> None:
    """Let requests that are over leave their blocks in all of the pool."""
    rng = np.random.default_rng(1)
    slot = 1_000_000
    while state.pool.num_free > 600:
        state.scheduler.submit(
            Submission(
                session_id=1,
                session_slot=slot,
                request_id=str(slot),
                prompt_token_ids=rng.integers(3, 100, size=BLOCK_TOKENS * 256).astype(np.int32),
                resumed_token_ids=np.empty(0, dtype=np.int32),
                sampling=SamplingParams(),
                stopping=StoppingParams(max_new_tokens=1),
            )
        )
        slot += 1
        while state.scheduler.num_open:
            plan = state.scheduler.schedule()
            assert plan is not None
            state.scheduler.update(result_of(plan))
        state.scheduler.take_outputs()


def result_of(plan: StepPlan) -> StepResult:
    """Return tokens that end no request."""
    slots = plan.slots[plan.sample_rows]
    return StepResult(step_id=plan.step_id, slots=slots, token_ids=np.full(len(slots), 5, dtype=np.int32))


def move_adapters(state: EngineState) -> None:
    """Have all loads done at once."""
    state.cache.loads.take_unloads()
    for load in state.cache.loads.take_loads():
        state.cache.load_finished(load.digest)


def measure(state: EngineState, num_running: int, num_steps: int) -> NDArray[np.float64]:
    """Return seconds of schedule and update per steady step, ``[num_steps, 2]``."""
    scheduler = state.scheduler
    in_flight = scheduler.schedule()
    while in_flight is None or scheduler.batch.num_prefill_tokens or len(scheduler.batch) < num_running:
        move_adapters(state)
        following = scheduler.schedule()
        if in_flight is not None:
            scheduler.update(result_of(in_flight))
        scheduler.take_outputs()
        in_flight = following
    samples = np.empty((num_steps, 2))
    for step in range(num_steps):
        begin = time.perf_counter()
        plan = scheduler.schedule()
        middle = time.perf_counter()
        move_adapters(state)
        assert in_flight is not None
        result = result_of(in_flight)
        resumed = time.perf_counter()
        scheduler.update(result)
        scheduler.take_outputs()
        samples[step] = middle - begin, time.perf_counter() - resumed
        in_flight = plan
    scheduler.check_integrity()
    return samples


def report(case: str, samples: NDArray[np.float64]) -> float:
    """Print a case's figures; returns the median of both halves together, in microseconds."""
    print(f"{case}, microseconds:")
    columns = (("schedule", samples[:, 0]), ("update", samples[:, 1]), ("together", samples.sum(axis=1)))
    for name, column in columns:
        fastest, median, slow = np.percentile(column, (10, 50, 99)) * 1e6
        print(f"  {name:8} fastest decile {fastest:5.0f}   median {median:5.0f}   p99 {slow:5.0f}")
    return float(np.median(samples.sum(axis=1)) * 1e6)


def main() -> int:
    """Measure all cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=2000)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    print(f"{arguments.running} running, {arguments.waiting} waiting, {arguments.steps} steps")
    medians, bytes_per_adapter = {}, 0.0
    for case in ("base", "adapters", "pressure"):
        num_pages = 200_000 if case != "pressure" else 12_000 + arguments.running * arguments.steps // BLOCK_TOKENS
        state = make_state(arguments, num_pages)
        num_adapters = 0 if case == "base" else arguments.adapters
        if num_adapters:
            bytes_per_adapter = know_adapters(state, num_adapters)
        if case == "pressure":
            fill_with_cached_blocks(state)
        submit(state, arguments.running + arguments.waiting, num_adapters)
        medians[case] = report(case, measure(state, arguments.running, arguments.steps))
        state.arena.close()
    print(f"host memory per known adapter: {bytes_per_adapter:.0f} bytes of {arguments.adapters} adapters")
    holds = max(medians.values()) < MOST_MEDIAN_US and bytes_per_adapter < MOST_ADAPTER_BYTES
    shown = ", ".join(f"{case} {median:.0f} us" for case, median in medians.items())
    print(f"{'holds' if holds else 'FAILS'}: medians {shown}; {bytes_per_adapter:.0f} bytes per adapter")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
