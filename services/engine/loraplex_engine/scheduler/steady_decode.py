"""Many identical decode steps at once: what a simulator in virtual time jumps over instead of planning each.

Steps are *steady* while every running request decodes and nothing but their own tokens changes: nobody is admitted or
preempted, no prefill is left, no step is in flight. The last steady step is the one that ends a request by its length;
stop tokens are not foreseen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.messages import FinishReason
from loraplex_engine.pages.page_pool import PageOwner

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from loraplex_engine.limits import SchedulerCounters
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.scheduler.admission import Admission
    from loraplex_engine.scheduler.decode_growth import DecodeGrowth
    from loraplex_engine.scheduler.decode_state import Rows
    from loraplex_engine.scheduler.eviction import PageSource
    from loraplex_engine.scheduler.request_book import RequestBook
    from loraplex_engine.scheduler.running_batch import RunningBatch
    from loraplex_engine.scheduler.step_costs import StepCosts
    from loraplex_engine.scheduler.waiting_queue import WaitingQueue
    from loraplex_engine.scheduler.warming import Warming

    Draw = Callable[[Rows, NDArray[np.int32], int], NDArray[np.int32]]
    """(slots, first positions in their sequences, how many) -> token ids, int32 ``[len(slots), how many]``."""


class SteadyDecode:
    """Looks ahead over, and takes, steady steps of a scheduler's batch."""

    def __init__(
        self,
        *,
        batch: RunningBatch,
        pool: PagePool,
        eviction: PageSource,
        growth: DecodeGrowth,
        queue: WaitingQueue,
        admission: Admission,
        warming: Warming,
        costs: StepCosts,
        book: RequestBook,
        counters: SchedulerCounters,
    ) -> None:
        self._batch = batch
        self._pool = pool
        self._eviction = eviction
        self._growth = growth
        self._queue = queue
        self._admission = admission
        self._warming = warming
        self._costs = costs
        self._book = book
        self._counters = counters

    def horizon(self, now_s: float) -> int:
        """Return how many steady steps can be taken at least, from now on and if nothing arrives; 0 if none.

        Requests may wait: as long as nothing changes, admission does not look at them (`Admission.is_settled`). A step for
        which an adapter has to give way is not steady: what that opens to admission and warming is theirs to decide.
        """
        batch = self._batch
        if batch.num_prefill_tokens or len(batch) == 0 or not self._is_settled(now_s):
            return 0
        state, rows = batch.state, batch.rows
        steps = int((state.max_outputs.take(rows) - state.next_position.take(rows)).min())
        room = self._room(rows)
        needed = int(self._missing(room, steps).sum())
        free = self._eviction.num_free
        if needed <= free:
            return steps
        # rows that lack pages make room for a few more (`DecodeGrowth`): so many must be to be had without an adapter
        quiet = self._eviction.num_quiet(needed + self._growth.watermark)
        return self._steps_within(room, steps, max(free, quiet - self._growth.watermark))[0]

    def _steps_within(self, room: NDArray[np.int32], most: int, num_pages: int) -> tuple[int, NDArray[np.int32]]:
        """Return how many steps that many pages suffice for, up to ``most``, and what each row lacks for them."""
        missing = self._missing(room, most)
        if int(missing.sum()) <= num_pages:
            return most, missing
        low, high, missing = 0, most, self._missing(room, 0)  # low suffices, high does not
        while high - low > 1:
            middle = (low + high) // 2
            more = self._missing(room, middle)
            if int(more.sum()) <= num_pages:
                low, missing = middle, more
            else:
                high = middle
        return low, missing

    def _is_settled(self, now_s: float) -> bool:
        return self._admission.is_settled(now_s) and self._warming.is_settled

    def _room(self, rows: Rows) -> NDArray[np.int32]:
        """Return how many more tokens each row's blocks have room for, int32 ``[N]``."""
        state = self._batch.state
        room: NDArray[np.int32] = state.num_blocks.take(rows) * state.block_tokens - state.num_computed.take(rows)
        return room

    def _missing(self, room: NDArray[np.int32], num_steps: int) -> NDArray[np.int32]:
        """Return how many blocks each row lacks for ``num_steps`` more tokens, int32 ``[N]``."""
        size = self._batch.state.block_tokens
        missing: NDArray[np.int32] = np.maximum(num_steps + size - 1 - room, 0) // size
        return missing

    def take(self, num_steps: int, draw: Draw, now_s: float, growth_s: float) -> None:
        """Do ``num_steps`` steady steps at once.

        Args:
            num_steps: At most `horizon`.
            draw: Makes the tokens.
            now_s: The end of the last of them.
            growth_s: By how much each takes longer than the one before it.
        """
        state, rows = self._batch.state, self._batch.rows
        left = num_steps
        while left:
            count, missing = self._steps_within(self._room(rows), left, self._eviction.num_free)
            if count == 0:  # blocks give way at the very step that lacks pages
                if len(self._growth.grow(rows)) != len(rows):
                    raise RuntimeError("a steady step lacks pages")
                count = 1  # to which `grow` has given its pages
            self._append(rows, missing)
            self._advance(rows, count, draw)
            left -= count
        self._counters.num_steps += num_steps
        self._counters.num_output_tokens += num_steps * len(rows)
        self._queue.shares.charge_outputs(state.shares.take(rows), num_steps)
        self._costs.observe_steady(done_s=now_s, num_steps=num_steps, growth_s=growth_s)
        over = rows[state.next_position.take(rows) >= state.max_outputs.take(rows)]
        for slot in over.tolist():
            self._book.finish(self._batch.at(slot), FinishReason.LENGTH)

    def _advance(self, rows: Rows, num_steps: int, draw: Draw) -> None:
        """Do steps for which the rows have the blocks."""
        state = self._batch.state
        first = state.num_prompt_tokens.take(rows) + state.next_position.take(rows)
        columns = first[:, None] + np.arange(num_steps, dtype=np.int32)
        state.tokens[rows[:, None], columns] = draw(rows, first, num_steps)
        state.num_computed[rows] += num_steps
        state.next_position[rows] += num_steps
        state.num_outputs[rows] += num_steps

    def _append(self, rows: Rows, missing: NDArray[np.int32]) -> None:
        """Give each row the pages that it lacks, in order."""
        growing = missing.nonzero()[0]
        if not len(growing):
            return
        state, counts = self._batch.state, missing[growing]
        ends = counts.cumsum()
        within = np.arange(ends[-1]) - (ends - counts).repeat(counts)
        owners = rows[growing].repeat(counts)
        state.blocks[owners, state.num_blocks.take(owners) + within] = self._pool.allocate(int(ends[-1]), PageOwner.KV)
        state.num_blocks[rows[growing]] += counts
