"""A tensor-parallel group as one `ModelRunner`: rank 0 computes here, the others in processes of their own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from loraplex_engine.rank_split import choice_text
from loraplex_engine.ranks.figures import RankBook
from loraplex_engine.ranks.gloo import GlooGroup
from loraplex_engine.ranks.group_load import GroupLoad
from loraplex_engine.ranks.processes import RankProcesses, SharedFiles
from loraplex_engine.ranks.rank_line import RankSetup
from loraplex_engine.ranks.rank_records import Kind, Load, load_bytes, plan_bytes, unload_bytes
from loraplex_engine.runners.torch.runner import TorchRunner

if TYPE_CHECKING:
    import numpy as np
    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray

    from loraplex_engine.model.weights import WeightReader
    from loraplex_engine.model_runner import StepHandle
    from loraplex_engine.ranks.rank_line import Said
    from loraplex_engine.runners.runner_config import RunnerConfig
    from loraplex_engine.step import StepPlan

COLLECTIVE_TIMEOUT: Final = timedelta(minutes=30)
"""Ranks may need so much longer than others for their weights; a rank that has ended or hangs is noticed otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPlan:
    """What the processes of a group are started with.

    Attributes:
        degree: Ranks of the group.
        model: Directory of the base model.
        text_only: Whether a multimodal model means its text part.
        num_threads: Compute threads of each rank.
        arena_fd: Memory file of the host arena, which has a part for each rank.
        on_lost: Called once, from any thread, with what happened when a rank ends or hangs.
        book: Takes what ranks say of themselves.
        log_level: As the engine's.
        log_format: As the engine's.
    """

    degree: int
    model: Path
    text_only: bool
    num_threads: int
    arena_fd: int
    on_lost: Callable[[str], None]
    book: RankBook
    log_level: str
    log_format: str


class RankedRunner:
    """See `ModelRunner`; what rank 0 does, the others do, too, in the same order.

    Args:
        config: Sizes.
        weights: Rank 0's part of the base model; closed here.
        plan: The group.

    Raises:
        GroupLostError: If a rank ends before it is ready.
    """

    backend: ClassVar[str] = TorchRunner.backend

    def __init__(self, config: RunnerConfig, weights: WeightReader, plan: GroupPlan) -> None:
        self._loads: dict[int, GroupLoad] = {}
        self._numbers = itertools.count()
        self._num_others = plan.degree - 1
        self._meeting_fd = os.memfd_create("loraplex-meeting", os.MFD_CLOEXEC)
        setups = [_setup(config, plan, rank) for rank in range(1, plan.degree)]
        files = SharedFiles(plan.arena_fd, self._meeting_fd)
        self._processes = RankProcesses(
            setups, plan.book, files=files, on_lost=plan.on_lost, on_load=self._load_answered
        )
        try:
            self._group = GlooGroup.meet(self._meeting_fd, 0, plan.degree, timeout=COLLECTIVE_TIMEOUT)
            plan.book.collective_s = lambda: self._group.collective_s
            self._runner = TorchRunner(config, weights, self._group)
            plan.book.pair_splits = lambda: self._runner.pair_splits
            self._processes.wait_ready()
        except BaseException:
            self._processes.close()
            raise

    @property
    def pids(self) -> dict[int, int]:
        """Process of each rank but rank 0."""
        return self._processes.pids

    @property
    def geometry(self) -> Geometry:
        """See `ModelRunner`."""
        return self._runner.geometry

    @property
    def weight_norms(self) -> tuple[float, ...]:
        """See `ModelRunner`."""
        return self._runner.weight_norms

    @property
    def pipeline_depth(self) -> int:
        """See `ModelRunner`."""
        return self._runner.pipeline_depth

    def launch(self, plan: StepPlan) -> StepHandle:
        """Compute a step on all ranks; see `ModelRunner.launch`.

        Raises:
            GroupLostError: If a rank is gone.
        """
        try:
            self._processes.tell(Kind.PLAN, plan_bytes(plan))
            return self._runner.launch(plan)
        except Exception as error:
            self._processes.check_after(error)
            raise

    def check_adapter(self, spec: AdapterSpec) -> None:
        """See `ModelRunner`."""
        self._runner.check_adapter(spec)

    def pin_host_memory(self, arena: NDArray[np.uint8]) -> object:
        """See `ModelRunner`."""
        return self._runner.pin_host_memory(arena)

    def load_adapter(
        self,
        index: int,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        slots: tuple[int, ...] = (),
    ) -> GroupLoad:
        """Start to copy each rank's image into its pool; see `ModelRunner.load_adapter`."""
        if len(slots) != len(pages):
            raise ValueError(
                f"an image of {len(pages)} pages in {len(slots)} slots of the arena: ranks read theirs there"
            )
        number, load = next(self._numbers), GroupLoad(self._num_others)
        own = self._runner.load_adapter(
            index, spec, pages, source
        )  # refuses what no rank can bind, before others hear of it
        self._loads[number] = load
        self._processes.tell(Kind.LOAD, load_bytes(Load(number, index, spec, pages, slots)))
        load.follow(own)
        return load

    def unload_adapter(self, index: int) -> None:
        """Unbind an index on all ranks, behind the steps that they were told of."""
        self._runner.unload_adapter(index)
        self._processes.tell(Kind.UNLOAD, [unload_bytes(index)])

    def close(self) -> None:
        """End all ranks; the others first, so that no load of rank 0 waits for one that they have given up."""
        self._processes.close()
        self._runner.close()
        self._group.close()
        os.close(self._meeting_fd)

    def _load_answered(self, said: Said) -> None:
        load = self._loads[said.number]
        load.answer(said)
        if load.is_answered:
            del self._loads[said.number]


def _setup(config: RunnerConfig, plan: GroupPlan, rank: int) -> RankSetup:
    limits = config.limits
    return RankSetup(
        rank=rank,
        degree=plan.degree,
        model=str(plan.model),
        text_only=plan.text_only,
        fingerprint=config.info.fingerprint,
        dtype=limits.pool.dtype,
        kv_dtype=limits.pool.kv_dtype,
        weight_form=config.weight_form.value,
        num_pages=limits.num_pages,
        num_arena_slots=limits.num_arena_slots,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_added_tokens=limits.max_added_tokens,
        pair_split=choice_text(config.pair_split),
        num_threads=plan.num_threads,
        log_level=plan.log_level,
        log_format=plan.log_format,
    )
