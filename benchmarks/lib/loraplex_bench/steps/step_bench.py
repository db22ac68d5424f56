"""A runner alone, with hand-made steps: what single steps take, kernel by kernel or as a whole."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.runners.cuda.runner import CudaRunner
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.step import NO_ADAPTER, StepPlan

from loraplex_bench.random_weights import RandomWeights
from loraplex_bench.rig import VALUE_STD
from loraplex_bench.steps.kernel_table import StepProfile, read_trace, summarise
from loraplex_bench.steps.plan import StepSize, make_plan

if TYPE_CHECKING:
    from loraplex_bench.shapes import AdapterFamily, Shape

DEVICE: Final = torch.device("cuda", 0)
TIMED_STEPS: Final = 20


class StepBench:
    """A runner with adapters behind the pages of its steps' sequences."""

    def __init__(self, shape: Shape, family: AdapterFamily, num_adapters: int, sizes: list[StepSize]) -> None:
        self.shape = shape
        self._kv_pages = max(size.num_pages(shape.pool) for size in sizes)
        tokens = max(size.num_decode + size.num_prompts * size.prompt_tokens for size in sizes)
        limits = EngineLimits(
            pool=shape.pool,
            num_pages=self._kv_pages + family.total_pages(shape, num_adapters),
            max_num_seqs=max(size.num_rows for size in sizes),
            max_model_len=1280,
            max_num_batched_tokens=tokens,
            max_resident_adapters=max(num_adapters, 1),
        )
        form = WeightForm.FP8 if shape.is_fp8 else WeightForm.WHOLE
        config = RunnerConfig(info=shape.info, limits=limits, device=str(DEVICE), weight_form=form)
        weights = RandomWeights(dtype=torch.bfloat16, device=DEVICE, has_blocks=shape.has_fp8_blocks)
        self.runner = CudaRunner(config, weights)
        self._step_id = 0
        self._load(family, num_adapters)

    def _load(self, family: AdapterFamily, num_adapters: int) -> None:
        begin, page_bytes = self._kv_pages, self.shape.geometry.page_bytes
        for index in range(num_adapters):
            pages = np.arange(begin, begin + family.num_pages(self.shape, index), dtype=np.int32)
            begin += len(pages)
            values = torch.empty(len(pages) * page_bytes // 2, dtype=torch.bfloat16, device=DEVICE)
            image = values.normal_(0, VALUE_STD).view(torch.uint8).view(len(pages), page_bytes).cpu().numpy()
            handle = self.runner.load_adapter(index, family.spec(self.shape, index), pages, image)
            while not handle.is_done():
                time.sleep(0.001)

    def plan(self, size: StepSize, num_adapters: int) -> StepPlan:
        """Return a step whose rows go round that many adapters."""
        self._step_id += 1
        rows = np.arange(size.num_rows, dtype=np.int32)
        adapters = rows % num_adapters if num_adapters else np.full_like(rows, NO_ADAPTER)
        return make_plan(size, self.shape.pool, adapters, step_id=self._step_id)

    def profile(self, name: str, size: StepSize, num_adapters: int) -> StepProfile:
        """Return the kernels of one step."""
        for _ in range(3):
            self.runner.launch(self.plan(size, num_adapters)).wait()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self.runner.launch(self.plan(size, num_adapters)).wait()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return summarise(name, read_trace(path))

    def step_ms(self, size: StepSize, num_adapters: int) -> tuple[float, float]:
        """Return (milliseconds per step with two in flight, median of the host's part)."""
        plans = [self.plan(size, num_adapters) for _ in range(TIMED_STEPS)]
        self.runner.launch(plans[0]).wait()
        host_s, in_flight = list[float](), []
        begin_s = time.perf_counter()
        for plan in plans[1:]:
            launched_s = time.perf_counter()
            in_flight.append(self.runner.launch(plan))
            host_s.append(time.perf_counter() - launched_s)
            if len(in_flight) == 2:
                in_flight.pop(0).wait()
        for handle in in_flight:
            handle.wait()
        return (time.perf_counter() - begin_s) / (len(plans) - 1) * 1e3, statistics.median(host_s) * 1e3
