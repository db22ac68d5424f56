"""Gaps between tokens. Each chunk of each stream is counted here, in three histograms by one look-up.

The bounds of the gateway's own histogram are among those of vLLM's, so one place among the latter tells both buckets.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from loraplex_common.tally import cumulated
from loraplex_common.vllm_metrics import ITL, TPOT
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

ITL_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5),
)
"""Upper bounds of the gateway's own histogram."""
_BOUNDS: Final = ITL.buckets
_NUM_BUCKETS: Final = len(_BOUNDS) + 1
_ENDS: Final = [_BOUNDS.index(bound) + 1 for bound in ITL_BUCKETS]
_MODEL: Final = ("model_name",)


class Gaps:
    """The tokens of one base model's streams, and the gaps before them."""

    __slots__ = ("_chunk_s", "_chunks", "_num_first", "_token_s", "_tokens")

    def __init__(self) -> None:
        self._tokens = [0] * _NUM_BUCKETS
        self._token_s = 0.0
        self._chunks = [0] * _NUM_BUCKETS
        self._chunk_s = 0.0
        self._num_first = 0

    @property
    def num_tokens(self) -> int:
        """Tokens so far, those without a gap before them too."""
        return self._num_first + sum(self._tokens)

    def first(self, num_tokens: int) -> None:
        """Count the tokens that a stream begins with: before the first there is no gap, before the others one of zero."""
        self._num_first += min(num_tokens, 1)
        self._tokens[0] += max(num_tokens - 1, 0)

    def resumed(self, num_tokens: int, gap_s: float) -> None:
        """Count the tokens that a stream goes on with after a break, ``gap_s`` seconds apart: no chunk of ours was before."""
        self._tokens[bisect_left(_BOUNDS, gap_s)] += num_tokens
        self._token_s += gap_s * num_tokens

    def further(self, num_tokens: int, gap_s: float) -> None:
        """Count the tokens of a chunk that came after another, ``gap_s`` seconds apart."""
        place = bisect_left(_BOUNDS, gap_s)
        self._tokens[place] += num_tokens
        self._token_s += gap_s * num_tokens
        self._chunks[place] += 1
        self._chunk_s += gap_s

    def by_token(self) -> tuple[list[tuple[str, float]], float]:
        """Return (upper bound, gaps up to it) for vLLM's buckets, each token with its own, and the sum of all gaps."""
        return cumulated(_BOUNDS, self._tokens), self._token_s

    def by_chunk(self) -> tuple[list[int], float]:
        """Return the chunks of each of the gateway's buckets, the last without a bound, and the sum of their mean gaps."""
        upto = [0, *accumulate(self._chunks)]
        ends = [*_ENDS, _NUM_BUCKETS]
        return [upto[end] - upto[begin] for begin, end in zip([0, *ends], ends, strict=False)], self._chunk_s


class GapMetrics(Collector):
    """What Prometheus sees of the gaps of all base models.

    Args:
        registry: Where it is registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._models: dict[str, Gaps] = {}
        registry.register(self)

    def of(self, model: str) -> Gaps:
        """Return the gaps of a base model."""
        return self._models.setdefault(model, Gaps())

    def describe(self) -> Iterator[Metric]:
        """Name the metrics, so that second ones of their names are refused."""
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        """Show the state of this moment."""
        own, itl, tpot, tokens = self._families()
        chunks, chunk_s = [0] * (len(ITL_BUCKETS) + 1), 0.0
        for model, gaps in self._models.items():
            buckets, total_s = gaps.by_token()
            for family in (itl, tpot):
                family.add_metric([model], buckets, total_s)
            tokens.add_metric([model], gaps.num_tokens)
            counts, sum_s = gaps.by_chunk()
            chunks = [mine + more for mine, more in zip(chunks, counts, strict=True)]
            chunk_s += sum_s
        own.add_metric([], cumulated(ITL_BUCKETS, chunks), chunk_s)
        yield from (own, itl, tpot, tokens)

    @staticmethod
    def _families() -> tuple[HistogramMetricFamily, HistogramMetricFamily, HistogramMetricFamily, CounterMetricFamily]:
        text = "Mean time between the tokens of one chunk and the next."
        return (
            HistogramMetricFamily("loraplex_gateway_itl_seconds", text, labels=()),
            HistogramMetricFamily(ITL.name, ITL.text, labels=_MODEL),
            HistogramMetricFamily(TPOT.name, TPOT.text, labels=_MODEL),
            CounterMetricFamily("vllm:generation_tokens", "Tokens generated.", labels=_MODEL),
        )
