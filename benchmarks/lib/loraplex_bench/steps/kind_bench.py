"""A runner alone with adapters of several kinds: what its steps take, also while adapters load."""

from __future__ import annotations

import mmap
import time
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import torch
from loraplex_engine.limits import EngineLimits
from loraplex_engine.runners.cuda.runner import CudaRunner
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_kernels.lora.tables import AdapterTables

from loraplex_bench.random_weights import RandomWeights
from loraplex_bench.steps.plan import StepSize, make_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.model_runner import LoadHandle, StepHandle
    from loraplex_engine.step import StepPlan
    from numpy.typing import NDArray

    from loraplex_bench.shapes import Shape
    from loraplex_bench.steps.part_images import KindImage

MAX_LOAD_S: Final = 60.0
COPY_BYTES: Final = 2 << 30


class KindSteps(Protocol):
    """What the measurements ask of a runner."""

    def load(self, kind: str, number: int) -> LoadHandle:
        """Start to load adapter ``number``, its index in the table too, of a kind."""
        ...

    def unload(self, number: int) -> None:
        """Unbind an adapter; its pages are the next adapter's of that number."""
        ...

    def step_times(
        self, adapters: NDArray[np.int32], count: int, between: Callable[[], bool] | None = None
    ) -> list[float]:
        """Return the seconds from the end of each step to the end of the next, two in flight.

        Args:
            adapters: int32 ``[rows]``.
            count: Steps, at least.
            between: Called after each launch; steps go on until it returns True.
        """
        ...

    def copy_bytes_per_s(self) -> float:
        """Return what a copy reads and writes in a second."""
        ...


class KindBench:
    """A `KindSteps` of a CUDA runner.

    Args:
        shape: The model.
        images: Adapters by kind.
        numbers: The numbers of each kind's adapters.
        max_rows: Most decode rows.
    """

    def __init__(self, shape: Shape, images: dict[str, KindImage], numbers: dict[str, range], max_rows: int) -> None:
        self._shape, self._images, self._size = shape, images, StepSize(num_decode=max_rows)
        begin = self._size.num_pages(shape.pool)
        self._pages: dict[int, NDArray[np.int32]] = {}
        for kind, of_kind in numbers.items():
            for number in of_kind:
                self._pages[number] = np.arange(begin, begin + len(images[kind].image), dtype=np.int32)
                begin += len(images[kind].image)
        limits = EngineLimits(
            pool=shape.pool,
            num_pages=begin,
            max_num_seqs=max_rows,
            max_model_len=512,
            max_num_batched_tokens=max(512, max_rows),
            max_resident_adapters=len(self._pages),
        )
        device = torch.device("cuda", 0)
        config = RunnerConfig(info=shape.info, limits=limits, device=str(device))
        self.runner = CudaRunner(config, RandomWeights(dtype=torch.bfloat16, device=device))
        stacked = sum(len(image.image) for image in images.values()), shape.geometry.page_bytes
        # Mapped, as the engine's arena is: chunks that are pinned must begin on a page of the operating system.
        self._arena = np.frombuffer(mmap.mmap(-1, stacked[0] * stacked[1]), dtype=np.uint8).reshape(stacked)
        np.concatenate([image.image for image in images.values()], out=self._arena)
        self._places, first = dict[str, slice](), 0
        for kind, image in images.items():
            self._places[kind] = slice(first, first + len(image.image))
            first += len(image.image)
        self.runner.pin_host_memory(self._arena).wait()
        self._step_id = 0

    def load(self, kind: str, number: int) -> LoadHandle:
        """See `KindSteps`."""
        spec, source = self._images[kind].spec(number), self._arena[self._places[kind]]
        return self.runner.load_adapter(number, spec, self._pages[number][: len(source)], source)

    def unload(self, number: int) -> None:
        """See `KindSteps`."""
        self.runner.unload_adapter(number)

    def step_times(
        self, adapters: NDArray[np.int32], count: int, between: Callable[[], bool] | None = None
    ) -> list[float]:
        """See `KindSteps`."""
        in_flight, times, ended_s = list["StepHandle"](), list[float](), 0.0
        launched, may_end = 0, between is None
        deadline_s = time.monotonic() + MAX_LOAD_S
        while launched < count or not may_end:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{launched} steps took {MAX_LOAD_S} s and what is beside them did not end")
            in_flight.append(self.runner.launch(self._plan(adapters)))
            launched += 1
            if between is not None:
                may_end = between()
            if len(in_flight) == 2:
                in_flight.pop(0).wait()
                now = time.perf_counter()
                times.append(now - ended_s)
                ended_s = now
        for handle in in_flight:
            handle.wait()
        return times[2:]  # the first has no step before it

    def copy_bytes_per_s(self) -> float:
        """See `KindSteps`."""
        source = torch.ones(COPY_BYTES // 8, dtype=torch.float32, device="cuda")
        target = torch.empty_like(source)
        best = float("inf")
        for _ in range(6):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            target.copy_(source)
            stop.record()
            stop.synchronize()
            best = min(best, start.elapsed_time(stop) / 1e3)
        return COPY_BYTES / best

    def _plan(self, adapters: NDArray[np.int32]) -> StepPlan:
        self._step_id += 1
        size = StepSize(num_decode=len(adapters), context=self._size.context)
        return make_plan(size, self._shape.pool, adapters, step_id=self._step_id)


class DrySteps:
    """A `KindSteps` without a device: it binds what is loaded, makes the plans and takes no time.

    Args:
        shape: The model.
        images: Adapters by kind.
        num_adapters: Size of the table.
    """

    def __init__(self, shape: Shape, images: dict[str, KindImage], num_adapters: int) -> None:
        self._shape, self._images = shape, images
        self._tables = AdapterTables(
            shape.geometry, max_adapters=num_adapters, tile_capacity=1 << 20, device=torch.device("cpu")
        )

    def load(self, kind: str, number: int) -> LoadHandle:
        """See `KindSteps`."""
        image = self._images[kind]
        self._tables.bind(number, image.spec(number), np.arange(len(image.image), dtype=np.int32))
        return _Done()

    def unload(self, number: int) -> None:
        """See `KindSteps`."""
        self._tables.unbind(number)

    def step_times(
        self, adapters: NDArray[np.int32], count: int, between: Callable[[], bool] | None = None
    ) -> list[float]:
        """See `KindSteps`."""
        make_plan(StepSize(num_decode=len(adapters)), self._shape.pool, adapters)
        if not self._tables.has_others.size or int(adapters.max(initial=-1)) >= self._tables.has_others.size:
            raise ValueError("a row names an adapter behind the table")
        while between is not None and not between():
            pass
        return [1e-3] * count

    def copy_bytes_per_s(self) -> float:
        """See `KindSteps`."""
        return 1e12


class _Done:
    def is_done(self) -> bool:
        return True

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        callback()
