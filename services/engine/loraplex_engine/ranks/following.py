"""What a rank other than 0 does: it takes records from the ring, one after another, and computes."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from loraplex_common.base_model import load_base_model

from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.model.weight_layout import WeightLayout
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.rank_split import choice_of
from loraplex_engine.ranks.figures import RankFigures, resident_bytes
from loraplex_engine.ranks.gloo import GlooGroup
from loraplex_engine.ranks.rank_line import Said, Word, say
from loraplex_engine.ranks.rank_records import Kind, read_load, read_plan, read_unload
from loraplex_engine.ranks.runner import COLLECTIVE_TIMEOUT
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.follower import TorchFollower

if TYPE_CHECKING:
    import socket

    from numpy.typing import NDArray

    from loraplex_engine.model_runner import LoadHandle
    from loraplex_engine.ranks.plan_ring import RingReader
    from loraplex_engine.ranks.rank_line import RankSetup


def make_follower(setup: RankSetup, meeting_fd: int) -> TorchFollower:
    """Load a rank's part of the model; returns once all ranks have loaded theirs. They meet through a memory file."""
    info = load_base_model(Path(setup.model), text_only=setup.text_only, fingerprint=setup.fingerprint)
    pool = choose_pool_geometry(info, dtype=setup.dtype, tp_degree=setup.degree, kv_dtype=setup.kv_dtype)
    limits = EngineLimits(
        pool=pool,
        num_pages=setup.num_pages,
        num_arena_slots=setup.num_arena_slots,
        max_added_tokens=setup.max_added_tokens,
        max_model_len=setup.max_model_len,
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
    )
    form = WeightForm(setup.weight_form)
    group = GlooGroup.meet(meeting_fd, setup.rank, setup.degree, timeout=COLLECTIVE_TIMEOUT)
    layout = WeightLayout(tp_degree=setup.degree, tp_rank=setup.rank)
    weights = WeightReader(
        Path(setup.model), dtype=DTYPES[pool.dtype], device=torch.device("cpu"), layout=layout, form=form
    )
    config = RunnerConfig(info=info, limits=limits, weight_form=form, pair_split=choice_of(setup.pair_split))
    return TorchFollower(config, weights, group)


def pages_of(arena: NDArray[np.uint8], slots: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return an image ``[num_pages, page_bytes]``: a view if the slots are consecutive, else a copy."""
    first = slots[0]
    if slots == tuple(range(first, first + len(slots))):
        return arena[first : first + len(slots)]
    return arena[list(slots)]


class Following:
    """Carries out what rank 0 says.

    Args:
        follower: This rank's runner.
        line: Takes the answers.

    Attributes:
        arena: The rank's part of the host arena, ``[num_slots, page_bytes]``.
    """

    def __init__(self, follower: TorchFollower, line: socket.socket) -> None:
        self._follower, self._line = follower, line
        self.arena: NDArray[np.uint8] = np.empty((0, self.page_bytes), dtype=np.uint8)
        self._num_steps, self._step_s = 0, 0.0
        self._pages_of: dict[int, int] = {}  # place in the adapter table -> pages

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self._follower.geometry.page_bytes

    def figures(self) -> RankFigures:
        """Return what this rank has done; from any thread."""
        return RankFigures(
            num_steps=self._num_steps,
            step_s=self._step_s,
            collective_s=self._follower.collective_s,
            adapter_pages=sum(list(self._pages_of.values())),
            resident_bytes=resident_bytes(),
        )

    def run(self, ring: RingReader) -> None:
        """Follow for as long as the process lives."""
        for kind, payload in ring.records():
            match Kind(kind):
                case Kind.PLAN:
                    began_s = time.perf_counter()
                    self._follower.follow(read_plan(payload))
                    self._step_s += time.perf_counter() - began_s
                    self._num_steps += 1
                case Kind.LOAD:
                    self._load(payload)
                case Kind.UNLOAD:
                    place = read_unload(payload)
                    self._follower.unload_adapter(place)
                    del self._pages_of[place]

    def _load(self, payload: bytes) -> None:
        load = read_load(payload)
        source = pages_of(self.arena, load.slots)
        try:
            handle = self._follower.load_adapter(load.place, load.spec, load.pages, source)
        except Exception as error:
            say(self._line, Said(Word.LOAD_FAILED, load.number, f"{type(error).__name__}: {error}"))
            return
        self._pages_of[load.place] = len(load.pages)
        handle.add_done_callback(partial(self._answer, load.number, handle))

    def _answer(self, number: int, handle: LoadHandle) -> None:
        try:
            handle.is_done()
        except Exception as error:
            say(self._line, Said(Word.LOAD_FAILED, number, f"{type(error).__name__}: {error}"))
        else:
            say(self._line, Said(Word.LOADED, number))
