"""How one kernel call is timed and checked: cold L2, a CUDA graph, the median of 15 replays."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REPLAYS = 15
MAX_ERROR = 2e-2
COPY_BYTES = 2 << 30


def copy_bytes_per_s() -> float:
    """Return what a copy of 1 GiB reads and writes in a second, the best of six."""
    source = torch.ones(COPY_BYTES // 8, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    best_ms = float("inf")
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        best_ms = min(best_ms, start.elapsed_time(stop))
    return COPY_BYTES / best_ms * 1e3


def time_us(calls: Sequence[Callable[[], object]], flush: torch.Tensor) -> float:
    """Median time of one call, in microseconds, with weights cold in L2."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for index in range(REPLAYS + 2):
        flush.sum()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times)


def require_close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Compare a case's result with fp32's.

    Raises:
        RuntimeError: Naming the case, if the relative error is `MAX_ERROR` or more.
    """
    error = ((got.float() - want.float()).norm() / want.float().norm()).item()
    if not error < MAX_ERROR:
        raise RuntimeError(f"{what}: relative error {error:.3g}")
