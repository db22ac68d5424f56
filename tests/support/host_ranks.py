"""A tensor-parallel group of `PartRunner`s, a thread for each rank: the CUDA backend's steps, kernels on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernels.host_kernels import HostLibrary
from loraplex_common.adapter_image import pack
from loraplex_engine.ranks.rank_records import plan_bytes, read_plan
from support.host_parts import PartRunner
from support.rank_threads import TIMEOUT, RankThread, make_on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import torch
    from loraplex_common.adapter_image import AdapterSpec, Tensors
    from loraplex_engine.rank_group import RankGroup
    from loraplex_engine.step import StepPlan
    from numpy.typing import NDArray
    from support.host_decoder import Done
    from support.plans import Harness


class HostRanks:
    """All ranks as one runner of a `Harness`; ranks but 0 get plans as their ring brings them.

    Args:
        model_dir: The base model.
        degree: Ranks.
        scratch: Directory for calls of kernels.
        dtype: Element type.
        options: Further arguments of each `PartRunner`.

    Attributes:
        runners: By rank.
        images: Each rank's image of the adapter that is loaded next.
    """

    def __init__(self, model_dir: Path, degree: int, scratch: Path, dtype: torch.dtype, **options: Any) -> None:
        def make(group: RankGroup) -> PartRunner:
            folder = scratch / f"rank{group.rank}"
            folder.mkdir()
            return PartRunner(model_dir, HostLibrary(dtype, folder), group=group, **options)

        self.runners = make_on_ranks(degree, make)
        self.images: list[NDArray[np.uint8]] = []
        self._threads = [RankThread() for _ in self.runners]
        self.geometry, self.pool_geometry = self.runners[0].geometry, self.runners[0].pool_geometry

    @property
    def steps(self) -> list[torch.Tensor]:
        """Logits of each step."""
        return self.runners[0].steps

    def load(self, harness: Harness, spec: AdapterSpec, tensors: Tensors) -> int:
        """Load each rank's part of an adapter; returns the adapter's index."""
        self.images = [pack(self.geometry, spec, tensors, rank) for rank in range(len(self.runners))]
        return harness.load(spec, self.images[0])

    def launch(self, plan: StepPlan) -> Done:
        told = read_plan(b"".join(plan_bytes(plan)))
        done: Done = self._on_all(lambda rank: self.runners[rank].launch(told if rank else plan))
        return done

    def load_adapter(self, index: int, spec: AdapterSpec, pages: NDArray[np.int32], source: NDArray[np.uint8]) -> Done:
        del source
        done: Done = self._on_all(lambda rank: self.runners[rank].load_adapter(index, spec, pages, self.images[rank]))
        return done

    def close(self) -> None:
        """End all threads."""
        for runner, thread in zip(self.runners, self._threads, strict=True):
            runner.magnitudes.close()
            thread.end()

    def _on_all(self, work: Callable[[int], Any]) -> Any:
        """Do something on all ranks; returns what rank 0's came to."""
        futures = [thread.do(lambda r=rank: work(r)) for rank, thread in enumerate(self._threads)]  # type: ignore[misc]
        first, *_ = [future.result(TIMEOUT.total_seconds()) for future in futures]
        return first
