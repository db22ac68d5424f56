"""What the scheduler costs the host per steady decode step: schedule + update, nothing computed.

Usage: ``python benchmarks/scheduler_cost.py [--running 256] [--waiting 2000] [--steps 2000]``

Prints the fastest decile, the median and the 99th percentile of both halves in microseconds, at pipeline depth 2 (one
plan in flight). On a busy machine only the fastest decile says something about the code.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from loraplex_engine.adapter_cache import AdapterCache
from loraplex_engine.arena import HostArena
from loraplex_engine.limits import SchedulerLimits
from loraplex_engine.messages import SamplingParams, StoppingParams, Submission
from loraplex_engine.page_pool import PagePool
from loraplex_engine.scheduler import Scheduler
from loraplex_engine.step import StepPlan, StepResult

BLOCK_TOKENS = 16
MAX_MODEL_LEN = 8192


def make_scheduler(num_running: int, num_waiting: int) -> Scheduler:
    """Return a scheduler with a full batch ahead of a long queue."""
    pool = PagePool(200_000)
    arena = HostArena(1, 4096)
    cache = AdapterCache(pool=pool, arena=arena, max_resident=64, emit=lambda _event: None, clock=time.monotonic)
    limits = SchedulerLimits(
        block_tokens=BLOCK_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=num_running,
        max_num_batched_tokens=8192,
        max_pass_over_s=2.0,
        eos_token_ids=(2,),
    )
    scheduler = Scheduler(limits=limits, pool=pool, cache=cache, page_bytes=4096, clock=time.monotonic)
    rng = np.random.default_rng(0)
    for slot in range(num_running + num_waiting):
        scheduler.submit(
            Submission(
                session_id=1 + slot % 2,
                session_slot=slot,
                request_id=str(slot),
                prompt_token_ids=np.arange(3, 3 + int(rng.integers(1, 200)), dtype=np.int32),
                resumed_token_ids=np.empty(0, dtype=np.int32),
                sampling=SamplingParams(),
                stopping=StoppingParams(max_new_tokens=MAX_MODEL_LEN - 256, stop_token_ids=(0, 1)),
            )
        )
    return scheduler


def result_of(plan: StepPlan) -> StepResult:
    """Return tokens that end no request."""
    slots = plan.slots[plan.sample_rows]
    return StepResult(step_id=plan.step_id, slots=slots, token_ids=np.full(len(slots), 5, dtype=np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    scheduler = make_scheduler(arguments.running, arguments.waiting)
    in_flight = scheduler.schedule()
    while scheduler.batch.num_prefill_tokens or len(scheduler.batch) < arguments.running:
        following = scheduler.schedule()
        assert in_flight is not None
        scheduler.update(result_of(in_flight))
        scheduler.take_outputs()
        in_flight = following
    samples = np.empty((arguments.steps, 2))
    for step in range(arguments.steps):
        begin = time.perf_counter()
        plan = scheduler.schedule()
        middle = time.perf_counter()
        assert in_flight is not None
        result = result_of(in_flight)
        resumed = time.perf_counter()
        scheduler.update(result)
        scheduler.take_outputs()
        samples[step] = middle - begin, time.perf_counter() - resumed
        in_flight = plan
    print(f"{arguments.running} running, {arguments.waiting} waiting, {arguments.steps} steps, microseconds:")
    for name, column in (("schedule", samples[:, 0]), ("update", samples[:, 1]), ("together", samples.sum(axis=1))):
        fastest, median, slow = np.percentile(column, (10, 50, 99)) * 1e6
        print(f"  {name:8} fastest decile {fastest:5.0f}   median {median:5.0f}   p99 {slow:5.0f}")


if __name__ == "__main__":
    main()
