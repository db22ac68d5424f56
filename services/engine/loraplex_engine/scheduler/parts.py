"""What a scheduler is made of, and how the parts know each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_engine.limits import SchedulerCounters, SchedulerLimits
from loraplex_engine.pages.page_worth import page_worth_of
from loraplex_engine.pages.prefix_cache import PrefixCache
from loraplex_engine.scheduler.adapter_fetching import AdapterFetching, Reservation
from loraplex_engine.scheduler.admission import Admission
from loraplex_engine.scheduler.decode_growth import DecodeGrowth
from loraplex_engine.scheduler.decode_state import DecodeState
from loraplex_engine.scheduler.eviction import PageEviction, PageSource
from loraplex_engine.scheduler.expected_lengths import ExpectedLengths
from loraplex_engine.scheduler.fair_shares import FairShares
from loraplex_engine.scheduler.first_token_deadlines import FirstTokenDeadlines
from loraplex_engine.scheduler.fixed_shares import AdapterShare, KvShare
from loraplex_engine.scheduler.outputs import OutputCollector
from loraplex_engine.scheduler.prefix_sharing import PrefixSharing
from loraplex_engine.scheduler.request_book import RequestBook
from loraplex_engine.scheduler.result_reader import ResultReader
from loraplex_engine.scheduler.running_batch import RunningBatch
from loraplex_engine.scheduler.size_check import SizeCheck
from loraplex_engine.scheduler.steady_decode import SteadyDecode
from loraplex_engine.scheduler.step_costs import StepCosts
from loraplex_engine.scheduler.waiting_queue import WaitingQueue
from loraplex_engine.scheduler.warming import Warming

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerParts:
    """Made by `build_parts`."""

    counters: SchedulerCounters
    costs: StepCosts
    queue: WaitingQueue
    batch: RunningBatch
    prefix: PrefixCache
    collector: OutputCollector
    book: RequestBook
    reader: ResultReader
    sizes: SizeCheck
    first_tokens: FirstTokenDeadlines
    fetching: AdapterFetching
    admission: Admission
    growth: DecodeGrowth
    warming: Warming
    steady: SteadyDecode


def build_parts(
    *, limits: SchedulerLimits, pool: PagePool, cache: AdapterCache, page_bytes: int, clock: Callable[[], float]
) -> SchedulerParts:
    """Make a scheduler's parts over one pool; arguments as of `Scheduler`."""
    policy, block_tokens = limits.policy, limits.block_tokens
    counters, costs, collector = SchedulerCounters(), StepCosts(), OutputCollector()
    lengths, reservation = ExpectedLengths(policy.growth_quantile), Reservation()
    queue = WaitingQueue(
        FairShares(max_running_per_key=policy.max_running_per_key),
        policy=policy.queue_policy,
        ttft_slo_s=policy.ttft_slo_s,
        promote_after_s=policy.promote_after_s,
    )
    state = DecodeState(max_num_seqs=limits.max_num_seqs, max_model_len=limits.max_model_len, block_tokens=block_tokens)
    batch = RunningBatch(state=state, pool=pool)
    prefix = PrefixCache(pool, half_life_s=policy.half_life_s, page_worth=page_worth_of(policy.eviction))
    sharing = PrefixSharing(prefix=prefix, state=state, is_enabled=policy.enable_prefix_cache)
    for_kv, for_adapters = _room_makers(limits, pool=pool, cache=cache, prefix=prefix, costs=costs)
    book = RequestBook(
        queue=queue,
        batch=batch,
        cache=cache,
        sharing=sharing,
        lengths=lengths,
        collector=collector,
        counters=counters,
        page_bytes=page_bytes,
        clock=clock,
    )
    sizes = SizeCheck(pool=pool, cache=cache, book=book, block_tokens=block_tokens)
    first_tokens = FirstTokenDeadlines(
        costs=costs, cache=cache, batch=batch, queue=queue, sharing=sharing, book=book, counters=counters
    )
    fetching = AdapterFetching(
        queue=queue, batch=batch, cache=cache, eviction=for_adapters, sizes=sizes, book=book, reservation=reservation
    )
    admission = Admission(
        limits=limits,
        queue=queue,
        batch=batch,
        pool=pool,
        cache=cache,
        sharing=sharing,
        eviction=for_kv,
        fetching=fetching,
        reservation=reservation,
        lengths=lengths,
        sizes=sizes,
        first_tokens=first_tokens,
        book=book,
    )
    growth = DecodeGrowth(batch=batch, pool=pool, cache=cache, eviction=for_kv, admission=admission, book=book)
    warming = Warming(cache=cache, eviction=for_adapters, batch=batch, queue=queue, is_enabled=policy.enable_warming)
    return SchedulerParts(
        counters=counters,
        costs=costs,
        queue=queue,
        batch=batch,
        prefix=prefix,
        collector=collector,
        book=book,
        reader=ResultReader(
            batch=batch, book=book, sharing=sharing, shares=queue.shares, collector=collector, counters=counters
        ),
        sizes=sizes,
        first_tokens=first_tokens,
        fetching=fetching,
        admission=admission,
        growth=growth,
        warming=warming,
        steady=SteadyDecode(
            batch=batch,
            pool=pool,
            eviction=for_kv,
            growth=growth,
            queue=queue,
            admission=admission,
            warming=warming,
            costs=costs,
            book=book,
            counters=counters,
        ),
    )


def _room_makers(
    limits: SchedulerLimits, *, pool: PagePool, cache: AdapterCache, prefix: PrefixCache, costs: StepCosts
) -> tuple[PageSource, PageSource]:
    """Return who makes room for KV and who for adapters: one economy for both, unless the policy cuts the pool."""
    policy = limits.policy
    if policy.kv_share is None:
        eviction = PageEviction(
            pool=pool,
            cache=cache,
            prefix=prefix,
            costs=costs,
            block_tokens=limits.block_tokens,
            page_worth=page_worth_of(policy.eviction),
        )
        return eviction, eviction
    num_kv = round(pool.num_pages * policy.kv_share)
    for_adapters = AdapterShare(num_pages=pool.num_pages - num_kv, pool=pool, cache=cache)
    return KvShare(num_pages=num_kv, pool=pool, prefix=prefix), for_adapters
