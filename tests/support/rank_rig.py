"""A tensor-parallel group in one process: a thread for each rank, over gloo."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weight_layout import WeightLayout
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.rank_split import CPU_RATES
from loraplex_engine.ranks.gloo import GlooGroup
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.follower import TorchFollower
from loraplex_engine.runners.torch.runner import TorchRunner
from support.oracle import Rig
from support.plans import Harness
from torch._C._distributed_c10d import HashStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_engine.rank_split import PairSplit, RankRates
    from loraplex_engine.step import StepPlan
    from numpy.typing import NDArray

TIMEOUT = timedelta(seconds=20)


class _Rank:
    """A rank's thread, which does what it is told in order."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def do(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._work.put((work, future))
        return future

    def end(self) -> None:
        self._work.put(None)
        self.thread.join(TIMEOUT.total_seconds())

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)


class _Loads:
    """A load on all ranks."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles, self._left, self._lock = handles, len(handles), threading.Lock()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        def one() -> None:
            with self._lock:
                self._left -= 1
                is_last = not self._left
            if is_last:
                callback()

        for handle in self._handles:
            handle.add_done_callback(one)

    def is_done(self) -> bool:
        return all([handle.is_done() for handle in self._handles])


class RankedRunner:
    """Rank 0's runner as a `Harness` needs it; what it does, the other ranks do, too.

    Attributes:
        images: Each rank's image of the adapter that is loaded next.
    """

    def __init__(self, runners: Sequence[TorchRunner], ranks: Sequence[_Rank]) -> None:
        self.runner, self.followers, self._ranks = runners[0], runners[1:], ranks
        self.images: list[NDArray[np.uint8]] = []
        self.geometry, self.weight_norms = self.runner.geometry, self.runner.weight_norms

    def launch(self, plan: StepPlan) -> Any:
        follow = [self._each(rank, lambda f=follower: f.follow(plan)) for rank, follower in self._numbered()]  # type: ignore[misc]
        handle = self.runner.launch(plan)
        for future in follow:
            future.result(TIMEOUT.total_seconds())
        return handle

    def load_adapter(
        self, index: int, spec: AdapterSpec, pages: NDArray[np.int32], source: NDArray[np.uint8]
    ) -> _Loads:
        del source
        runners = (self.runner, *self.followers)
        return _Loads([r.load_adapter(index, spec, pages, im) for r, im in zip(runners, self.images, strict=True)])

    def unload_adapter(self, index: int) -> None:
        for runner in (self.runner, *self.followers):
            runner.unload_adapter(index)

    def close(self) -> None:
        for runner in (self.runner, *self.followers):
            runner.close()
        for rank in self._ranks:
            rank.end()

    def _numbered(self) -> list[tuple[_Rank, TorchFollower]]:
        return list(zip(self._ranks, self.followers, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def _each(rank: _Rank, work: Callable[[], Any]) -> Future[Any]:
        return rank.do(work)


def make_ranked_rig(
    model_dir: Path,
    degree: int,
    *,
    num_pages: int = 256,
    kv_dtype: str = "",
    pair_split: PairSplit | RankRates = CPU_RATES,
) -> Rig:
    """Build a group over a model directory."""
    info = load_base_model(model_dir)
    geometry = choose_pool_geometry(info, dtype="float32", tp_degree=degree, kv_dtype=kv_dtype)
    limits = EngineLimits(pool=geometry, num_pages=num_pages, max_num_seqs=64, max_model_len=512)
    store = HashStore()

    def make(rank: int) -> TorchRunner:
        group = GlooGroup(store, rank, degree, timeout=TIMEOUT)
        layout = WeightLayout(tp_degree=degree, tp_rank=rank)
        weights = WeightReader(model_dir, dtype=torch.float32, device=torch.device("cpu"), layout=layout)
        config = RunnerConfig(info=info, limits=limits, pair_split=pair_split)
        return TorchFollower(config, weights, group) if rank else TorchRunner(config, weights, group)

    with ThreadPoolExecutor(degree) as makers:
        runners = list(makers.map(make, range(degree)))
    ranked: Any = RankedRunner(runners, [_Rank() for _ in range(degree - 1)])
    return Rig(ranked, Harness(ranked, geometry, num_pages), {None: -1})


def load_on_ranks(rig: Rig, spec: AdapterSpec, tensors: Any) -> int:
    """Load an adapter on all ranks; return its index."""
    ranked: Any = rig.runner
    geometry = ranked.geometry
    ranked.images = [pack(geometry, spec, tensors, rank) for rank in range(geometry.tp_degree)]
    return rig.harness.load(spec, ranked.images[0])
