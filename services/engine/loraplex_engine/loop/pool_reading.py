"""A reading of the page pool for people: taken on the step loop's thread between two steps, made sense of elsewhere.

On the loop's thread, arrays are copied and a few fields of each request and of each adapter on the device are read; which
sequence holds which page is worked out where the reading is used.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from loraplex_engine.messages import ResidencyState
from loraplex_engine.pages.page_pool import PageOwner, Pages
from loraplex_engine.scheduler.request import RequestState

if TYPE_CHECKING:
    from loraplex_engine.adapters.adapter import Adapter
    from loraplex_engine.loop.engine_state import EngineState
    from loraplex_engine.scheduler.request import Request

MAX_REQUESTS: Final = 1000
MAX_ADAPTERS: Final = 2000


class Phase(enum.Enum):
    """Where a request stands."""

    QUEUED = "queued"
    LOADING = "loading"  # waits for its adapter
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """An open request.

    Attributes:
        number: As of `Request`.
        num_computed: Tokens of prompt and output that are in the pool.
    """

    number: int
    request_id: str
    phase: Phase
    digests: tuple[str, ...]
    fairness_key: str
    num_prompt: int
    num_computed: int
    num_outputs: int
    num_pages: int
    age_s: float


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """An adapter on the device.

    Attributes:
        pages: Those that it holds.
        octaves: How often it was asked for, as of `ArrivalRates`; changes with each request alone.
        per_s: The same in requests per second, as of the reading.
    """

    digest: str
    state: ResidencyState
    pages: Pages
    is_pinned: bool
    num_leases: int
    generation: int
    max_rank: int
    octaves: float
    per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolReading:
    """The pool between two steps.

    Attributes:
        owners: int8 ``[num_pages]``, a `PageOwner` each; a copy.
        running: Numbers of the running requests ``[R]``, by admission.
        blocks: int32 ``[R, B]``, the pages of each; B is the most of any.
        num_blocks: int32 ``[R]``.
        requests: Open requests, running ones first; at most `MAX_REQUESTS` of ``num_requests``.
        adapters: Those on the device, those asked for most first; at most `MAX_ADAPTERS` of ``num_adapters``.
        half_life_s: After which a request counts half in `ReadAdapter.per_s`.
    """

    owners: NDArray[np.int8]
    running: NDArray[np.int64]
    blocks: NDArray[np.int32]
    num_blocks: NDArray[np.int32]
    requests: Sequence[ReadRequest]
    num_requests: int
    adapters: Sequence[ReadAdapter]
    num_adapters: int
    half_life_s: float

    def holders(self, number_of: dict[str, int]) -> NDArray[np.int64]:
        """Return the holder of each page, ``[num_pages]``; 0 where there is none, or it is left out.

        Args:
            number_of: digest -> number for `ReadAdapter`s. Requests have their own number, plus 1.
        """
        holders = np.zeros(len(self.owners), dtype=np.int64)
        is_block = np.arange(self.blocks.shape[1]) < self.num_blocks[:, None]
        holders[self.blocks[is_block]] = np.repeat(self.running + 1, self.num_blocks)
        for adapter in self.adapters:
            holders[adapter.pages] = number_of[adapter.digest]
        holders[(self.owners != PageOwner.KV) & (self.owners != PageOwner.ADAPTER)] = 0
        return holders


def read_pool(state: EngineState, now_s: float) -> PoolReading:
    """Read the pool, on the thread that it belongs to."""
    batch, rows = state.scheduler.batch, state.scheduler.batch.state
    running = batch.requests
    slots = np.array([request.slot for request in running], dtype=np.intp)
    num_blocks = rows.num_blocks[slots]
    asked = state.scheduler.book.requests if len(state.scheduler.queue) else running
    waiting = (request for request in asked if request.state is RequestState.WAITING)
    told = [_running(request, state, now_s) for request in running[:MAX_REQUESTS]]
    told += [_waiting(request, now_s) for request in islice(waiting, MAX_REQUESTS - len(told))]
    on_device = [adapter for adapter in state.cache.states.all if adapter.pages is not None]
    rates = state.cache.ranking.rates
    if len(on_device) > MAX_ADAPTERS:
        on_device.sort(key=lambda adapter: rates.octaves(adapter.digest), reverse=True)
    return PoolReading(
        owners=state.pool.owners(),
        running=np.array([request.number for request in running], dtype=np.int64),
        blocks=rows.blocks[slots, : int(num_blocks.max(initial=0))],
        num_blocks=num_blocks,
        requests=told,
        num_requests=len(state.scheduler.book),
        adapters=[_adapter(adapter, state, now_s) for adapter in on_device[:MAX_ADAPTERS]],
        num_adapters=len(on_device),
        half_life_s=rates.half_life_s,
    )


def _running(request: Request, state: EngineState, now_s: float) -> ReadRequest:
    rows, slot = state.scheduler.batch.state, request.slot
    return ReadRequest(
        number=request.number,
        request_id=request.submission.request_id,
        phase=Phase.DECODE if rows.is_decoding[slot] else Phase.PREFILL,
        digests=request.digests,
        fairness_key=request.submission.fairness_key,
        num_prompt=request.num_prompt_tokens,
        num_computed=int(rows.num_computed[slot]),
        num_outputs=int(rows.num_outputs[slot]),
        num_pages=int(rows.num_blocks[slot]),
        age_s=now_s - request.arrived_s,
    )


def _waiting(request: Request, now_s: float) -> ReadRequest:
    return ReadRequest(
        number=request.number,
        request_id=request.submission.request_id,
        phase=Phase.LOADING if request.is_parked else Phase.QUEUED,
        digests=request.digests,
        fairness_key=request.submission.fairness_key,
        num_prompt=request.num_prompt_tokens,
        num_computed=0,
        num_outputs=len(request.output_token_ids),
        num_pages=0,
        age_s=now_s - request.arrived_s,
    )


def _adapter(adapter: Adapter, state: EngineState, now_s: float) -> ReadAdapter:
    assert adapter.pages is not None
    rates = state.cache.ranking.rates
    return ReadAdapter(
        digest=adapter.digest,
        state=adapter.state,
        pages=adapter.pages,
        is_pinned=adapter.is_pinned,
        num_leases=adapter.num_leases,
        generation=adapter.generation,
        max_rank=adapter.max_rank,
        octaves=rates.octaves(adapter.digest),
        per_s=rates.per_s(adapter.digest, now_s),
    )
