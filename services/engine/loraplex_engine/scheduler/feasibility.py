"""Ends requests that cannot be served: those that never fit, and those whose first token cannot come in time any more.

A request with a scale of its own on an adapter that multiplies what the base computes is refused once the adapter is known.

A request that alone needs more pages than the pool has is refused at once, with the arithmetic. A request that has an
objective for its first token ends as soon as the objective is out of reach, while ending it still helps others. The
estimate is the least time that the request would wait if it were next: the copy of its adapter, the prefill admitted
before it, and its own. It comes from measured costs only; no request ends on a guess. The present estimate gives the
moment from which the objective is out of reach; the request is looked at again then, so a waiting request costs nothing
in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.errors import (
    DeadlineError,
    InvalidParameterError,
    LoraplexError,
    RequestTooLargeError,
    SloUnreachableError,
)
from loraplex_common.flora import FLORA
from loraplex_common.vectors import IN_VECTOR, OUT_VECTOR

from loraplex_engine.messages import ResidencyState
from loraplex_engine.scheduler.request import Request, RequestState

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.scheduler.prefix_sharing import PrefixSharing
    from loraplex_engine.scheduler.request_book import RequestBook
    from loraplex_engine.scheduler.step_costs import StepCosts

_MULTIPLIERS: Final = {
    OUT_VECTOR: "a factor on its outputs (DoRA, (IA)3)",
    IN_VECTOR: "a factor on its inputs ((IA)3)",
    FLORA: "FLoRA",
}
_MIN_RETRY_S: Final = 0.1
_MAX_RETRY_S: Final = 60.0


class Feasibility:
    """Compares what a request needs with what the pool has, and the time to its first token with what it can wait.

    Args:
        book: Ends the requests that cannot be served.
        sharing: Knows which tokens need not be computed.
        costs: Measured costs of steps.
    """

    def __init__(
        self, *, book: RequestBook, pool: PagePool, cache: AdapterCache, sharing: PrefixSharing, costs: StepCosts
    ) -> None:
        self._book = book
        self._pool = pool
        self._cache = cache
        self._sharing = sharing
        self._costs = costs
        self._block_tokens = book.batch.state.block_tokens

    # --- size and scale ---

    def refuse_if_unservable(self, request: Request) -> bool:
        """End a request that can never be served, by what is known of its adapter by now; True if it was ended."""
        return self._refuse_if_unscalable(request) or self.refuse_if_too_large(request)

    def _refuse_if_unscalable(self, request: Request) -> bool:
        """End a request with a scale of its own on an adapter that multiplies what the base computes."""
        digest, scale = request.adapter_digest, request.submission.adapter_scale
        if digest is None or scale == 1:
            return False
        part = self._cache.states.unscalable_part_of(digest)
        if part is None:
            return False
        error = InvalidParameterError(
            f"adapter_scale: {scale:g} cannot be applied to adapter {digest}: in layer {part.layer}, {part.projection} has "
            f"{_MULTIPLIERS[part.kind]}, which multiplies what the base model computes; leave adapter_scale out, or name an "
            "adapter of pairs, biases and sparse deltas alone",
            field="adapter_scale",
        )
        self._book.fail(request, error)
        return True

    def refuse_if_too_large(self, request: Request) -> bool:
        """End a request that cannot fit even alone; an open-ended one is cut to the room there is instead."""
        digest = request.adapter_digest
        adapter_pages = (self._cache.states.num_pages_of(digest) or 0) if digest else 0
        pinned = self._cache.states.num_pinned_pages
        if digest is not None and self._cache.states.is_pinned(digest):
            pinned -= adapter_pages
        room = self._pool.num_pages - adapter_pages - pinned
        if request.submission.stopping.max_new_tokens is None:
            most = room * self._block_tokens + 1 - request.num_prompt_tokens
            request.max_outputs = min(request.max_outputs, max(most, len(request.output_token_ids) + 1))
        needed = -(-request.max_kv_tokens // self._block_tokens)
        if needed <= room:
            return False
        error = RequestTooLargeError(
            f"{request.num_prompt_tokens} prompt and {request.max_outputs} output tokens need {needed} pages of "
            f"{self._block_tokens} tokens, the adapter {adapter_pages} pages; the pool has {self._pool.num_pages}, "
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
        wait_s = 0.0
        digest = request.adapter_digest
        if digest is not None and self._cache.state_of(digest) is not ResidencyState.RESIDENT:
            num_pages = self._cache.states.num_pages_of(digest) or 0
            wait_s = num_pages * self._cache.ranking.costs.copy_s_per_page
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
