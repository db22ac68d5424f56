"""A recount of everything the scheduler holds."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.scheduler.request import Request
    from loraplex_engine.scheduler.request_book import RequestBook
    from loraplex_engine.scheduler.running_batch import RunningBatch
    from loraplex_engine.scheduler.waiting_queue import WaitingQueue


def check_requests(
    *, pool: PagePool, cache: AdapterCache, batch: RunningBatch, queue: WaitingQueue, book: RequestBook
) -> None:
    """Compare what requests hold with the accounts of pool, cache and fairness keys.

    Raises:
        RuntimeError: If something is lost or counted twice.
    """
    state, rows = batch.state, batch.rows
    blocks = state.blocks[state.blocks >= 0]
    pool.check_holds(blocks)
    if int(state.num_blocks[rows].sum()) != len(blocks):
        raise RuntimeError("a slot without an occupant has pages")
    if len(batch) + len(queue) != len(book):
        raise RuntimeError(f"{len(batch)} run, {len(queue)} wait, {len(book)} are open")
    running, waiting = batch.requests, list(queue)
    if len(waiting) != len(queue):
        raise RuntimeError(f"{len(waiting)} requests are in the queue's lines, {len(queue)} are accounted")
    _check_holds(cache, batch, waiting)
    queue.shares.check_integrity(
        waiting=[request.share for request in waiting],
        eligible=[request.share for request in waiting if not request.is_parked],
        running=[request.share for request in running],
    )
    prefill = sum(
        r.num_known_tokens - int(state.num_computed[r.slot]) for r in running if not state.is_decoding[r.slot]
    )
    if prefill != batch.num_prefill_tokens:
        raise RuntimeError(f"{prefill} tokens are to be prefilled, accounted are {batch.num_prefill_tokens}")
    shared = np.minimum(state.num_shared_blocks[rows], state.num_blocks[rows])
    if not np.array_equal(shared, state.num_shared_blocks[rows]):
        raise RuntimeError("a row shares more blocks than it has")


def _check_holds(cache: AdapterCache, batch: RunningBatch, waiting: list[Request]) -> None:
    """Compare leases and claims, adapter by adapter, with the requests that must have them."""
    running = batch.requests
    leases = Counter(digest for request in running for digest in request.digests)
    counted = {status.digest: status.num_leases for status in cache.states.statuses() if status.num_leases}
    if leases != counted or leases.total() != cache.num_leases:
        raise RuntimeError(f"running requests have the adapters {dict(leases)}, the cache counts the leases {counted}")
    claims = Counter(digest for request in waiting if request.has_claim for digest in request.digests)
    if claims != cache.states.claims or any(request.has_claim for request in running):
        raise RuntimeError(f"waiting requests claim {dict(claims)}, the cache counts {cache.states.claims}")
    if sum(request.adds_up for request in running) != batch.num_adding_up:
        raise RuntimeError(f"{batch.num_adding_up} running requests are accounted as having several adapters")
    for request in running:
        of_slot = [int(batch.state.leased[request.slot]), *batch.state.more_adapters[request.slot].tolist()]
        expected = [cache.states[digest].index for digest in request.digests]
        if [index for index in of_slot if index != NO_ADAPTER] != expected:
            raise RuntimeError(f"slot {request.slot} has the adapters {of_slot}, its request {expected}")
