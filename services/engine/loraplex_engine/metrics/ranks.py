"""What each tensor-parallel rank does, as rank 0 knows it; an engine of one rank is rank 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from loraplex_engine.rank_split import PairSplit
from loraplex_engine.ranks.figures import RankFigures, resident_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_engine.loop.engine import Engine
    from loraplex_engine.ranks.figures import RankBook


class RankCollector(Collector):
    """Figures of each rank, read when Prometheus asks; those of other ranks are at most a second old.

    Args:
        engine: The engine, whose process is rank 0.
        book: What it knows of the other ranks.
    """

    def __init__(self, engine: Engine, book: RankBook) -> None:
        self._engine, self._book = engine, book

    def collect(self) -> Iterator[Metric]:
        """Return the figures of this moment."""
        figures = {0: self._own(), **dict(sorted(self._book.others.items()))}
        steps = SummaryMetricFamily(
            "loraplex_engine_rank_step_seconds", "Time of a rank's steps, collectives included.", labels=["rank"]
        )
        waits = CounterMetricFamily(
            "loraplex_engine_rank_collective_seconds",
            "Time that a rank's steps spend in collectives, the wait for slower ranks included.",
            labels=["rank"],
        )
        pages = GaugeMetricFamily(
            "loraplex_engine_rank_adapter_pages", "Pages of a rank's pool that adapters have.", labels=["rank"]
        )
        memory = GaugeMetricFamily(
            "loraplex_engine_rank_resident_bytes", "Resident memory of a rank's process.", labels=["rank"]
        )
        for number, rank in figures.items():
            label = [str(number)]
            steps.add_metric(label, rank.num_steps, rank.step_s)
            waits.add_metric(label, rank.collective_s)
            pages.add_metric(label, rank.adapter_pages)
            memory.add_metric(label, rank.resident_bytes)
        yield from (steps, waits, pages, memory, self._splits())

    def _splits(self) -> Metric:
        splits = CounterMetricFamily(
            "loraplex_engine_adapter_splits",
            "Projections of steps whose adapters' pairs ranks computed with one factor whole, or with both divided.",
            labels=["split"],
        )
        counts = self._book.pair_splits()
        for split in PairSplit:
            splits.add_metric([split.value], counts.get(split, 0))
        return splits

    def _own(self) -> RankFigures:
        totals, load = self._engine.totals, self._engine.snapshot()
        return RankFigures(
            num_steps=totals.num_steps,
            step_s=totals.launch_s + totals.wait_s,
            collective_s=self._book.collective_s(),
            adapter_pages=load.pages_adapter + load.pages_pinned,
            resident_bytes=resident_bytes(),
        )
