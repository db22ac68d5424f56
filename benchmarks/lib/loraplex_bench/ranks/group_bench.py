"""Decode steps of a tensor-parallel group on this host's CPUs: rank 0 in this process, the others in their own, as an engine has them."""

from __future__ import annotations

import mmap
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_common.adapter_image import layout
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weight_layout import WeightLayout
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.rank_split import PairSplit
from loraplex_engine.ranks.figures import RankBook
from loraplex_engine.ranks.runner import GroupPlan, RankedRunner
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.step import NO_ADAPTER

from loraplex_bench.rig import VALUE_STD
from loraplex_bench.shapes import AdapterFamily, Shape
from loraplex_bench.steps.plan import StepSize, make_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_engine.model_runner import LoadHandle, ModelRunner
    from numpy.typing import NDArray

CONTEXT: Final = 32
WARM_STEPS: Final = 3
LOAD_S: Final = 60.0
DTYPE: Final = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSetup:
    """A group to measure.

    Attributes:
        model: Directory of the base model.
        degree: Ranks; 1 is the runner of an engine without a group.
        max_rows: Most rows of a step, each with an adapter of its own.
        pair_split: How ranks divide adapters' pairs.
        lora_ranks: Ranks of adapters, each on all seven projections; there are ``max_rows`` adapters of each.
    """

    model: Path
    degree: int
    max_rows: int
    lora_ranks: tuple[int, ...]
    pair_split: PairSplit = PairSplit.WHOLE


@dataclass(frozen=True, slots=True)
class StepTime:
    """Medians of one kind of step, in seconds.

    Attributes:
        step_s: From the launch to the result.
        collective_s: The part of it that rank 0 spent in collectives, waiting included.
    """

    step_s: float
    collective_s: float


class GroupBench:
    """Steps of one group.

    Args:
        setup: The group.
        lost: Is set when a rank ends.
    """

    def __init__(self, setup: GroupSetup, lost: threading.Event) -> None:
        info = load_base_model(setup.model)
        self._setup, self._book = setup, RankBook()
        self._pool = choose_pool_geometry(info, dtype=DTYPE, tp_degree=setup.degree)
        self._family = AdapterFamily(targets="all", ranks=setup.lora_ranks)
        self._shape = Shape(info=info, pool_gib=0.0, dtype=DTYPE)
        self._num_adapters = setup.max_rows * len(setup.lora_ranks)
        self._image_pages = self._pages_of_images(setup)
        self._kv_pages = StepSize(num_decode=setup.max_rows, context=CONTEXT).num_pages(self._pool)
        self._arena_bytes = max(self._image_pages) * self._pool.page_bytes
        self._arena_fd = os.memfd_create("loraplex-bench-arena", os.MFD_CLOEXEC)
        os.ftruncate(self._arena_fd, setup.degree * self._arena_bytes)
        self._step_id = 0
        self._runner = self._make_runner(setup, lost)
        self._load()

    def close(self) -> None:
        """End all ranks."""
        self._runner.close()
        os.close(self._arena_fd)

    def times(self, rows: int, steps: int) -> list[StepTime]:
        """Return what decode steps of so many rows take: first without adapters, then of each LoRA rank.

        Steps of all kinds alternate, so that what else the host does meets all of them.

        Args:
            rows: Rows of a step, at most the setup's.
            steps: How many of each kind count.
        """
        num_ranks, row = len(self._setup.lora_ranks), np.arange(rows, dtype=np.int32)
        kinds = [np.full_like(row, NO_ADAPTER), *(row * num_ranks + which for which in range(num_ranks))]
        found = [[self._step(adapters) for adapters in kinds] for _ in range(WARM_STEPS + steps)]
        medians = np.median(found[WARM_STEPS:], axis=0)
        return [StepTime(float(step_s), float(collective_s)) for step_s, collective_s in medians]

    def _step(self, adapters: NDArray[np.int32]) -> tuple[float, float]:
        """Return the seconds of one step, and those of them in collectives."""
        self._step_id += 1
        size = StepSize(num_decode=len(adapters), context=CONTEXT)
        plan = make_plan(size, self._pool, adapters, step_id=self._step_id)
        before_s, began_s = self._collective_s, time.perf_counter()
        self._runner.launch(plan).wait()
        return time.perf_counter() - began_s, self._collective_s - before_s

    @property
    def _collective_s(self) -> float:
        return self._book.collective_s() if self._setup.degree > 1 else 0.0

    def _pages_of_images(self, setup: GroupSetup) -> list[int]:
        """Return the pages of each adapter's image on one rank."""
        pool, shape = self._pool, self._shape
        geometry = shape.info.geometry(dtype=DTYPE, page_bytes=pool.page_bytes, tp_degree=setup.degree)
        specs = (self._family.spec(shape, index) for index in range(self._num_adapters))
        return [layout(geometry, spec.sizes).num_pages for spec in specs]

    def _make_runner(self, setup: GroupSetup, lost: threading.Event) -> ModelRunner:
        limits = EngineLimits(
            pool=self._pool,
            num_pages=self._kv_pages + sum(self._image_pages),
            num_arena_slots=max(self._image_pages),
            max_num_seqs=setup.max_rows,
            max_num_batched_tokens=setup.max_rows,
            max_model_len=2 * CONTEXT,
            max_resident_adapters=self._num_adapters,
        )
        ranks, cpu = WeightLayout(tp_degree=setup.degree, tp_rank=0), torch.device("cpu")
        weights = WeightReader(setup.model, dtype=DTYPES[DTYPE], device=cpu, layout=ranks)
        config = RunnerConfig(info=self._shape.info, limits=limits, pair_split=setup.pair_split)
        if setup.degree == 1:
            return TorchRunner(config, weights)
        plan = GroupPlan(
            degree=setup.degree,
            model=setup.model,
            text_only=False,
            num_threads=torch.get_num_threads(),
            arena_fd=self._arena_fd,
            on_lost=lambda _: lost.set(),
            book=self._book,
            log_level="warning",
            log_format="text",
        )
        return RankedRunner(config, weights, plan)

    def _load(self) -> None:
        """Load all adapters, one after another from the same slots of the arena; their values are random."""
        rng, page_bytes = np.random.default_rng(0), self._pool.page_bytes
        with mmap.mmap(self._arena_fd, self._setup.degree * self._arena_bytes) as memory:
            values = rng.standard_normal(len(memory) // 4, dtype=np.float32) * VALUE_STD
            memory[:] = values.tobytes()
        own = values[: self._arena_bytes // 4].view(np.uint8).reshape(-1, page_bytes)
        first = self._kv_pages
        for index, count in enumerate(self._image_pages):
            pages = np.arange(first, first + count, dtype=np.int32)
            spec = self._family.spec(self._shape, index)
            _wait(self._runner.load_adapter(index, spec, pages, own[:count], tuple(range(count))))
            first += count


def _wait(handle: LoadHandle) -> None:
    done = threading.Event()
    handle.add_done_callback(done.set)
    if not done.wait(LOAD_S):
        raise TimeoutError(f"an adapter is not loaded after {LOAD_S:.0f} s")
    handle.is_done()


@contextmanager
def running_group(setup: GroupSetup) -> Iterator[GroupBench]:
    """Start a group that ends with the block."""
    lost = threading.Event()
    bench = GroupBench(setup, lost)
    try:
        yield bench
    finally:
        bench.close()
    if lost.is_set():
        raise RuntimeError("a rank has ended while it was measured")
