"""An engine in this process with random adapters in its arena, driven through its public interface."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from loraplex_engine.limits import EngineLimits, SchedulingPolicy
from loraplex_engine.loop.engine import Engine
from loraplex_engine.messages import ImageArrived, ResidencyState
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner

from loraplex_bench.shapes import AdapterFamily, Shape

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from loraplex_engine.constraints.types import MaskFiller
    from loraplex_engine.messages import StoreEvent
    from loraplex_engine.model.weights import WeightSource
    from loraplex_engine.model_runner import ModelRunner
    from numpy.typing import NDArray


COMPARABLE: Final = SchedulingPolicy(enable_prefix_cache=False, enable_warming=False)
"""As the baselines were measured: no prefix cache, and no adapter on the device before the clock starts."""
VALUE_STD: Final = 0.02  # of adapter weights, as the baselines'
ANSWER_S: Final = 120.0
OS_PAGE: Final = 4096
TOUCH_THREADS: Final = 8
DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True, kw_only=True)
class RigSetup:
    """An engine to measure; equal setups may share one.

    Attributes:
        shape: The model.
        family: Kind of its adapters.
        num_adapters: Images in the arena at t = 0.
        limits: What bounds the engine, but for its arena, which has room for the adapters.
        dependent_launch: Launch our kernels programmatically dependent on those before them.
    """

    shape: Shape
    family: AdapterFamily
    num_adapters: int
    limits: EngineLimits
    dependent_launch: bool | None = None

    @property
    def engine_limits(self) -> EngineLimits:
        """What bounds the engine, with its arena."""
        return replace(self.limits, num_arena_slots=self.family.total_pages(self.shape, self.num_adapters) + 2)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the page pool."""
        return self.limits.num_pages * self.limits.page_bytes

    @property
    def description(self) -> str:
        """The setup in words."""
        limits = self.limits
        return (
            f"{self.shape.name}{', FP8' if self.shape.is_fp8 else ''}{', FP8 KV' if self.shape.kv_dtype else ''}, "
            f"{self.family.name}: at most {limits.max_num_seqs} sequences, "
            f"{limits.max_num_batched_tokens} batched tokens, max_model_len {limits.max_model_len}, pool of "
            f"{limits.num_pages} pages ({self.pool_bytes / 2**30:.1f} GiB; {limits.block_tokens} tokens each), "
            f"{limits.max_resident_adapters} table entries, {self.num_adapters} adapters in the arena"
        )

    def with_limits(self, **limits: Any) -> RigSetup:
        """Return the same setup with other limits; names as in `EngineLimits`."""
        return replace(self, limits=replace(self.limits, **limits))


def make_runner(setup: RigSetup, limits: EngineLimits, weights: WeightSource | None) -> ModelRunner:
    """Build the backend: ours over given weights, the torch backend where the shape has files."""
    shape = setup.shape
    if shape.model_dir is not None:
        torch.set_num_threads(1)
        reader = WeightReader(shape.model_dir, dtype=DTYPES[limits.pool.dtype], device=torch.device("cpu"))
        return TorchRunner(RunnerConfig(info=shape.info, limits=limits), reader)
    from loraplex_engine.runners.cuda.runner import CudaRunner  # needs cuda-python

    assert weights is not None
    form = WeightForm.FP8 if shape.is_fp8 else WeightForm.WHOLE
    device, dependent = str(DEVICE), setup.dependent_launch
    config = RunnerConfig(info=shape.info, limits=limits, device=device, dependent_launch=dependent, weight_form=form)
    return CudaRunner(config, weights)


def touch(memory: NDArray[np.uint8]) -> None:
    """Have the kernel commit memory, on several threads: pinning would do it page by page on one."""

    def fill(rows: NDArray[np.uint8]) -> None:
        rows[:, ::OS_PAGE] = 0

    with ThreadPoolExecutor(TOUCH_THREADS) as pool:
        list(pool.map(fill, np.array_split(memory, TOUCH_THREADS * 4)))


class Rig:
    """An engine, one session, and its adapters' images in the (pinned) arena.

    Args:
        setup: Sizes.
        weights: For our backend.
        filler: Fills the masks of structured outputs; None if no request has one.

    Attributes:
        ready_s: From the start of construction until the engine could serve; committing and filling the arena is not
            in it.
        capture_s: The part of it that capturing graphs took.
    """

    def __init__(self, setup: RigSetup, weights: WeightSource | None, filler: MaskFiller | None = None) -> None:
        self.setup = setup
        self._crashes: list[BaseException] = []
        self._pinned: object = None
        self.capture_s = 0.0
        self._touch_s = 0.0
        began_s = time.perf_counter()
        self.engine = Engine(
            setup.engine_limits,
            lambda limits: self._make_runner(limits, weights),
            on_store_event=self._on_store_event,
            on_crash=self._crashes.append,
            filler=filler,
        )
        self.ready_s = time.perf_counter() - began_s - self._touch_s
        self.outbox = self.engine.open_session()
        try:
            self._fill_arena()
        except BaseException:
            self.engine.close()
            raise

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine and free the device's memory."""
        self.engine.close()

    def check_alive(self) -> None:
        """Raise what killed the engine, if anything did."""
        if self._crashes:
            raise RuntimeError("the engine died") from self._crashes[0]

    def digest(self, adapter: int) -> str | None:
        """Return the digest of an adapter's index in a trace; None for the base model."""
        return f"{adapter:064x}" if adapter >= 0 else None

    @property
    def num_resident(self) -> int:
        """Adapters on the device."""
        return sum(status.state is ResidencyState.RESIDENT for status in self.engine.list_adapters().result(ANSWER_S))

    def evict_all(self) -> None:
        """Leave every adapter in the arena alone."""
        for status in self.engine.list_adapters().result(ANSWER_S):
            if status.state is ResidencyState.RESIDENT:
                self.engine.evict(status.digest).result(ANSWER_S)

    def _make_runner(self, limits: EngineLimits, weights: WeightSource | None) -> ModelRunner:
        runner = make_runner(self.setup, limits, weights)
        graphs = getattr(runner, "graphs", None)
        self.capture_s = graphs.capture_s if graphs is not None else 0.0
        pin = runner.pin_host_memory
        runner.pin_host_memory = lambda arena: self._pin(pin, arena)  # type: ignore[method-assign]
        return runner

    def _pin(self, pin: Callable[[NDArray[np.uint8]], object], arena: NDArray[np.uint8]) -> object:
        """Keep hold of the pinning, to wait for its end before anything is measured."""
        began_s = time.perf_counter()
        touch(arena)
        self._touch_s = time.perf_counter() - began_s
        self._pinned = pin(arena)
        return self._pinned

    def _on_store_event(self, event: StoreEvent) -> None:
        """Nothing is ever asked of a store: all images are in the arena."""

    def _fill_arena(self) -> None:
        wait = getattr(self._pinned, "wait", None)
        if wait is not None:
            wait()
        shape, family = self.setup.shape, self.setup.family
        page_bytes, view = shape.geometry.page_bytes, self.engine.arena.view
        rng = np.random.default_rng(0)
        for index in range(self.setup.num_adapters):
            spec, pages = family.spec(shape, index), family.num_pages(shape, index)
            slots = self.engine.grant_slots(spec.digest, pages, is_wanted=False).result(ANSWER_S)
            if slots is None:
                raise RuntimeError(f"the arena has no room for adapter {index} of {pages} pages")
            if shape.model_dir is not None:
                values = (rng.standard_normal(pages * page_bytes // 4) * VALUE_STD).astype(np.float32)
                view[list(slots)] = values.view(np.uint8).reshape(pages, page_bytes)
            else:
                device_values = torch.empty(pages * page_bytes // 2, dtype=torch.bfloat16, device=DEVICE)
                device_values.normal_(0, VALUE_STD)
                rows = device_values.view(torch.uint8).view(pages, page_bytes)
                for slot, row in zip(slots, rows, strict=True):  # the arena is pinned in pieces of whole slots:
                    torch.from_numpy(view[slot]).copy_(row)  # a copy across two of them would be refused
            self.engine.post(ImageArrived(spec, slots))
