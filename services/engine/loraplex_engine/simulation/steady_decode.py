"""Takes many identical decode steps at once: the simulator jumps over them instead of planning each.

Steps are *steady* while every running request decodes and nothing changes except their own tokens: no request is
admitted or preempted, no prefill is left, no step is in flight. The last steady step is the one that ends a request by
its length; stop tokens are not foreseen.

Positions of a row's tokens, with b blocks of s tokens, c = ``num_computed`` and n steps to take:

    [0, c)            in the pool
    [c, c + n)        added by the steps, one each
    [c, b * s)        room in the row's blocks (`_room`)
    [b * s, c + n)    beyond them, if not empty: the row lacks ceil((c + n - b * s) / s) blocks (`_missing`)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from loraplex_engine.messages import FinishReason
from loraplex_engine.pages.page_pool import PageOwner
from loraplex_engine.scheduler.decode_state import Rows
from loraplex_engine.scheduler.eviction import PageEviction
from loraplex_engine.scheduler.step_costs import LONGEST_FADE, WEIGHT, StepCosts

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.scheduler.scheduler import Scheduler

Draw = Callable[[Rows, NDArray[np.int32], int], NDArray[np.int32]]
"""(slots, first positions in their sequences, how many) -> token ids, int32 ``[len(slots), how many]``."""


class SteadyDecode:
    """Looks ahead over the steady steps of a scheduler's batch, and takes them.

    Args:
        scheduler: The scheduler; its owners are read and changed.
        pool: The scheduler's pages.
        cache: The scheduler's adapters.
        clock: The scheduler's clock.
    """

    def __init__(
        self, scheduler: Scheduler, *, pool: PagePool, cache: AdapterCache, clock: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._batch = scheduler.batch
        self._source = scheduler.kv_source
        self._pool = pool
        self._cache = cache
        self._clock = clock

    @property
    def horizon(self) -> int:
        """Decode steps from now on that are alike if nothing arrives, the last one ending a request; 0 if none are.

        Requests may wait: as long as nothing changes, admission does not look at them. A step that has to evict an
        adapter is not steady, as the eviction lets admission and warming decide anew.
        """
        batch, source = self._batch, self._source
        if self._scheduler.num_in_flight or batch.num_prefill_tokens or len(batch) == 0 or not self._is_settled:
            return 0
        state, rows = batch.state, batch.rows
        steps = int((state.max_outputs.take(rows) - state.next_position.take(rows)).min())
        room = self._room(rows)
        needed = int(self._missing(room, steps).sum())
        free = source.num_free
        if needed <= free:
            return steps
        # rows that lack pages make a few more free (`DecodeGrowth`), so that many must be free without evicting an
        # adapter
        watermark = self._scheduler.growth.watermark
        quiet = self._num_before_adapters(needed + watermark)
        return self._steps_within(room, steps, max(free, quiet - watermark))[0]

    def _num_before_adapters(self, most: int) -> int:
        """Return how many pages are free, or cached blocks that are evicted before any idle adapter, up to ``most``."""
        source = self._source
        if not isinstance(source, PageEviction):
            return min(most, source.num_obtainable)  # this source has no adapters' pages
        free = self._pool.num_free
        if free >= most or not self._pool.num_cached:
            return min(free, most)
        first = self._cache.ranking.least_idle
        bound = math.inf if first is None else first.worth - source.block_cost
        return free + self._scheduler.prefix.num_worth(bound, most - free)

    @property
    def _is_settled(self) -> bool:
        """True if admission and warming would change nothing, now or before something else happens."""
        scheduler, now_s = self._scheduler, self._clock()
        admission, queue, states = scheduler.admission, scheduler.queue, self._cache.states
        if admission.is_reserving or (states.num_pinned and states.pins_to_load):
            return False
        if queue.has_parked(states.changed):
            return False  # the next decision looks at these requests again
        if len(queue) and (admission.has_changed(now_s) or now_s >= queue.next_promotion_s):
            return False
        return scheduler.warming.is_settled

    def _steps_within(self, room: NDArray[np.int32], most: int, num_pages: int) -> tuple[int, NDArray[np.int32]]:
        """Return the steps that ``num_pages`` suffice for, up to ``most``, and the blocks that each row lacks for them.

        Searches the largest number of steps by halving:

            [0, low]        these numbers of steps need at most ``num_pages``
            [high, most]    these need more
        """
        missing = self._missing(room, most)
        if int(missing.sum()) <= num_pages:
            return most, missing
        low, high, missing = 0, most, self._missing(room, 0)  # ``low`` steps can be taken, ``high`` cannot
        while high - low > 1:
            middle = (low + high) // 2
            more = self._missing(room, middle)
            if int(more.sum()) <= num_pages:
                low, missing = middle, more
            else:
                high = middle
        return low, missing

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

    def skip(self, num_steps: int, draw: Draw, *, growth_s: float = 0.0) -> None:
        """Take steady steps as if each had been launched and read.

        The clock stands at the end of the last of these steps, and `Scheduler.next_deadline_s` has not passed.

        Args:
            num_steps: Steps to take, at most `horizon`.
            draw: Makes the tokens.
            growth_s: By how much each step takes longer than the one before it.
        """
        scheduler, state, rows = self._scheduler, self._batch.state, self._batch.rows
        left = num_steps
        while left:
            count, missing = self._steps_within(self._room(rows), left, self._source.num_free)
            if count == 0:  # blocks are evicted at the very step that lacks pages
                if len(scheduler.growth.grow(rows)) != len(rows):
                    raise RuntimeError("a steady step lacks pages")
                count = 1  # `grow` has given this step its pages
            self._append(rows, missing)
            self._advance(rows, count, draw)
            left -= count
        scheduler.counters.num_steps += num_steps
        scheduler.counters.num_output_tokens += num_steps * len(rows)
        scheduler.queue.shares.charge_outputs(state.shares.take(rows), num_steps)
        observe_steady(scheduler.costs, done_s=self._clock(), num_steps=num_steps, growth_s=growth_s)
        over = rows[state.next_position.take(rows) >= state.max_outputs.take(rows)]
        for slot in over.tolist():
            scheduler.book.finish(self._batch.at(slot), FinishReason.LENGTH)

    def _advance(self, rows: Rows, num_steps: int, draw: Draw) -> None:
        """Take steps for which the rows have the blocks."""
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


def observe_steady(costs: StepCosts, *, done_s: float, num_steps: int, growth_s: float = 0.0) -> None:
    """Have costs observe steps without prefill that followed the last observed step, as if one by one.

    Args:
        costs: Costs of the scheduler that took the steps.
        done_s: When the last of them was done.
        num_steps: Number of steps.
        growth_s: By how much each step took longer than the one before it.
    """
    first_s = (done_s - costs.last_done_s) / num_steps - growth_s * (num_steps - 1) / 2
    costs.last_done_s = done_s
    if first_s <= 0:
        return
    last_s = first_s + growth_s * (num_steps - 1)
    costs.longest_step_s = max(last_s, LONGEST_FADE**num_steps * costs.longest_step_s)
    if not costs.has_decode:
        costs.decode_step_s, costs.has_decode = first_s, True
        num_steps, first_s = num_steps - 1, first_s + growth_s
    # x <- x + w (t - x) over t = first + growth i, summed up with q = 1 - w
    fade = (1.0 - WEIGHT) ** num_steps
    ramp = (num_steps - 1 - num_steps * (1.0 - WEIGHT) + fade) / WEIGHT
    costs.decode_step_s = fade * costs.decode_step_s + (1.0 - fade) * first_s + growth_s * ramp
