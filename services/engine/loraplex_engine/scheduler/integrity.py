"""A recount of everything the scheduler holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool
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
    leases = sum(request.adapter_digest is not None for request in running)
    if not leases == cache.num_leases == sum(status.num_leases for status in cache.states.statuses()):
        raise RuntimeError(f"{leases} running requests have adapters, the cache counts other leases")
    claims = sum(request.has_claim for request in waiting)
    if claims != cache.states.num_claims or any(request.has_claim for request in running):
        raise RuntimeError(f"{claims} waiting requests claim adapters, the cache counts {cache.states.num_claims}")
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
