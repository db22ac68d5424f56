"""Ends requests that cannot be served: those that never fit, and those whose first token cannot come in time any more.

A request that alone needs more pages than the pool has is refused at once, with the arithmetic. A request that has an
objective for its first token ends as soon as the objective is out of reach, while ending it still helps others. The
estimate is the least time that the request would wait if it were next: the copy of its adapters, the prefill admitted
before it, and its own. It comes from measured costs only; no request ends on a guess. The present estimate gives the
moment from which the objective is out of reach; the request is looked at again then, so a waiting request costs nothing
in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.errors import DeadlineError, LoraplexError, RequestTooLargeError, SloUnreachableError

from loraplex_engine.messages import ResidencyState
from loraplex_engine.scheduler.adapter_terms import disagreement
from loraplex_engine.scheduler.request import Request, RequestState

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.limits import EngineLimits
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.scheduler.prefix_sharing import PrefixSharing
    from loraplex_engine.scheduler.request_book import RequestBook
    from loraplex_engine.scheduler.step_costs import StepCosts

_MIN_RETRY_S: Final = 0.1
_MAX_RETRY_S: Final = 60.0


class Feasibility:
    """Compares what a request needs with what the pool has, and the time to its first token with what it can wait.

    Args:
        limits: Sizes of adapter table and arena.
        book: Ends the requests that cannot be served.
        sharing: Knows which tokens need not be computed.
        costs: Measured costs of steps.
    """

    def __init__(
        self,
        *,
        limits: EngineLimits,
        book: RequestBook,
        pool: PagePool,
        cache: AdapterCache,
        sharing: PrefixSharing,
        costs: StepCosts,
    ) -> None:
        self._limits = limits
        self._book = book
        self._pool = pool
        self._cache = cache
        self._sharing = sharing
        self._costs = costs
        self._block_tokens = book.batch.state.block_tokens

    # --- the adapter ---

    def refuse_if_unservable(self, request: Request) -> bool:
        """End a request that can never be served, by what is known of its adapter by now; True if it was ended."""
        specs = (self._cache.states.spec_of(digest) for digest in request.digests)
        errors = (disagreement(request.submission, spec) for spec in specs if spec is not None)
        error = next((each for each in errors if each is not None), None) or self._too_many(request)
        if error is None:
            return self._refuse_if_too_large(request)
        self._book.fail(request, error)
        return True

    # --- size ---

    def _too_many(self, request: Request) -> LoraplexError | None:
        """Return why a request's adapters cannot be held together, whatever room its tokens take; None if they can."""
        if not request.adds_up:
            return None
        states, count = self._cache.states, len(request.digests)
        pinned = states.num_pinned - sum(states.is_pinned(digest) for digest in request.digests)
        places, slots = self._limits.max_resident_adapters, self._limits.num_arena_slots
        if count + pinned > places:
            return RequestTooLargeError(
                f"{count} adapters are to be added up; the engine's table of adapters has {places} places, {pinned} of them "
                "pinned by other adapters",
                metadata={"adapters": str(count), "table_places": str(places)},
            )
        num_pages = self._num_adapter_pages(request)
        if num_pages > slots:  # they must be in the arena at once: what has come alone keeps no other from coming
            return RequestTooLargeError(
                f"the {count} adapters that are to be added up take {num_pages} pages of {self._limits.page_bytes} bytes; the "
                f"arena has {slots}",
                metadata={"adapter_pages": str(num_pages), "arena_pages": str(slots)},
            )
        return None

    def _num_adapter_pages(self, request: Request) -> int:
        """Return the pages of a request's adapters, as far as they are known."""
        return sum(self._cache.states.num_pages_of(digest) or 0 for digest in request.digests)

    def _refuse_if_too_large(self, request: Request) -> bool:
        """End a request that cannot fit even alone; an open-ended one is cut to the room there is instead."""
        states = self._cache.states
        adapter_pages = self._num_adapter_pages(request)
        pinned = states.num_pinned_pages
        pinned -= sum(states.num_pages_of(digest) or 0 for digest in request.digests if states.is_pinned(digest))
        room = self._pool.num_pages - adapter_pages - pinned
        if request.submission.stopping.max_new_tokens is None:
            most = room * self._block_tokens + 1 - request.num_prompt_tokens
            request.max_outputs = min(request.max_outputs, max(most, len(request.output_token_ids) + 1))
        needed = -(-request.max_kv_tokens // self._block_tokens)
        if needed <= room:
            return False
        error = RequestTooLargeError(
            f"{request.num_prompt_tokens} prompt and {request.max_outputs} output tokens need {needed} pages of "
            f"{self._block_tokens} tokens, the {_adapters(request)} {adapter_pages} pages; the pool has {self._pool.num_pages}, "
            f"{pinned} of them pinned by other adapters",
            metadata={
                "kv_pages": str(needed),
                "adapter_pages": str(adapter_pages),
                "pool_pages": str(self._pool.num_pages),
            },
        )
        self._book.fail(request, error)
        return True

    # --- time to the first token ---

    def estimate_s(self, request: Request) -> float:
        """Return the least time to a waiting request's first token; 0 while nothing was measured."""
        if not self._costs.is_measured:
            return 0.0
        wait_s, states = 0.0, self._cache.states
        for digest in request.digests:
            if states.state_of(digest) is not ResidencyState.RESIDENT:
                wait_s += (states.num_pages_of(digest) or 0) * self._cache.ranking.costs.copy_s_per_page
        num_cached = len(self._sharing.find(request)) * self._block_tokens
        num_tokens = self._book.batch.num_prefill_tokens + request.num_known_tokens - num_cached
        return wait_s + self._costs.prefill_s(num_tokens)

    def unreachable_from_s(self, request: Request) -> float | None:
        """Return the moment from which a request misses its objective, by the present estimate; None without one."""
        if request.objective_s is None or request.first_token_s is not None:
            return None
        return request.objective_s - self.estimate_s(request)

    def end_if_unreachable(self, request: Request, now_s: float) -> bool:
        """End a waiting request whose first token cannot come in time; True if it was ended."""
        unreachable_s = self.unreachable_from_s(request)
        if request.state is not RequestState.WAITING or unreachable_s is None or now_s <= unreachable_s:
            return False
        self._book.counters.num_early_aborts += 1
        self._book.fail(request, self._error(request, now_s))
        return True

    def _error(self, request: Request, now_s: float) -> LoraplexError:
        needed_s = self.estimate_s(request)
        deadline_s = request.submission.deadline_s
        if deadline_s is not None and now_s + needed_s > deadline_s:
            return DeadlineError(
                f"the first token needs another {needed_s:.3f} s at least, the client's deadline is in "
                f"{deadline_s - now_s:.3f} s",
                drop_reason="rejected-ttl-expired",
            )
        return SloUnreachableError(
            f"after {now_s - request.arrived_s:.3f} s the first token needs another {needed_s:.3f} s at least, beyond "
            f"the objective of {(request.objective_s or now_s) - request.arrived_s:.3f} s",
            retry_after_s=self._retry_after_s(),
            drop_reason="rejected-saturated",
        )

    def _retry_after_s(self) -> float:
        """Return how long it takes to compute the prompts that wait now."""
        queued_s = self._book.queue.num_tokens * self._costs.prefill_s_per_token
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, queued_s))


def _adapters(request: Request) -> str:
    return f"{len(request.digests)} adapters" if request.adds_up else "adapter"
