"""What the gateway counts; names of docs/metrics.md."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from loraplex_common.auth import ANYBODY
from loraplex_common.exposition import OTHER, private
from loraplex_common.tally import RisingGauge, TallyCounter, TallyHistogram
from prometheus_client import Gauge

from loraplex_gateway.metrics.top_usage import TopUsage
from loraplex_gateway.metrics.vllm import VllmMetrics
from loraplex_gateway.scaling.demand import Demand
from loraplex_gateway.types import Priority

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

MAX_LABEL_VALUES: Final = 1000
JAIN_WINDOW_S: Final = 60.0
# A token of output costs about two of input.
OUTPUT_WEIGHT: Final = 2

TTFT_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
QUEUE_BUCKETS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class LabelCap:
    """Lets the first `MAX_LABEL_VALUES` values of a client-derived label through; the rest become ``other``."""

    def __init__(self, max_values: int = MAX_LABEL_VALUES) -> None:
        self._max_values = max_values
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """Return the value to use as the label."""
        if value in self._known:
            return value
        if len(self._known) >= self._max_values:
            return OTHER
        self._known.add(value)
        return value


class ServiceShares:
    """Weighted tokens per tenant in the last one to two windows, for Jain's fairness index.

    Source: Jain, Chiu, Hawe, "A Quantitative Measure of Fairness and Discrimination", DEC-TR-301, 1984.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._current: dict[str, float] = {}
        self._previous: dict[str, float] = {}
        self._since = clock()

    def add(self, tenant: str, weighted_tokens: float) -> None:
        """Count service given to a tenant."""
        self._roll()
        self._current[tenant] = self._current.get(tenant, 0.0) + weighted_tokens

    def jains_index(self) -> float:
        """Return (sum x)^2 / (n * sum x^2): 1 for equal shares, 1/n for one tenant having all; 1 without tenants."""
        self._roll()
        tenants = set(self._current) | set(self._previous)
        shares = [self._current.get(tenant, 0.0) + self._previous.get(tenant, 0.0) for tenant in tenants]
        squares = sum(share * share for share in shares)
        return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0

    def _roll(self) -> None:
        elapsed_s = self._clock() - self._since
        if elapsed_s < JAIN_WINDOW_S:
            return
        self._previous = self._current if elapsed_s < 2 * JAIN_WINDOW_S else {}
        self._current = {}
        self._since = self._clock()


class GatewayMetrics:
    """The gateway's metrics, registered once per registry.

    Attributes:
        vllm: Requests under the names that vLLM's dashboards read.
        demand: What waits here for an engine.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.vllm = VllmMetrics(registry)
        self.demand = Demand()
        self._adapter_label, self._tenant_label, self.shares = LabelCap(), LabelCap(), ServiceShares()
        prefix = "loraplex_gateway_"

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> TallyCounter:
            return TallyCounter(prefix + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> TallyHistogram:
            return TallyHistogram(prefix + name, text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests_total", "Requests that ended.", ("model", "adapter", "code"))
        self.queue_size = Gauge(prefix + "queue_size", "Requests waiting here.", ["priority"], registry=registry)
        self.queue_duration = histogram(
            "queue_duration_seconds", "Wait for a place on this gateway.", QUEUE_BUCKETS, ("outcome",)
        )
        self.ttft = histogram("ttft_seconds", "From the request's arrival to its first token.", TTFT_BUCKETS)
        self.tokens = counter("tokens_total", "Tokens.", ("tenant", "kind"))
        # A gauge by type, so that its name stays as the contract has it: counters get the suffix _total.
        text = "Service given: input tokens + 2 x output."
        self.fairness = RisingGauge(prefix + "fairness_counter", text, ["tenant"], registry=registry)
        self.retries = counter("retries_total", "Submissions repeated on another engine.")
        self.resumes = counter("resumes_total", "Streams whose engine was lost after output began.", ("outcome",))
        self.client_resumes = counter("client_resumes_total", "Broken streams that clients resumed.", ("outcome",))
        self.aborts = counter("aborts_total", "Requests that ended in an error or by cancellation.", ("reason",))
        self.resolutions = counter(
            "resolutions_total", "Adapters that requests named by their source, by outcome.", ("outcome",)
        )
        self.quota_refusals = counter(
            "quota_refusals_total", "Calls refused because of a tenant's quota.", ("tenant", "limit")
        )
        self.usage = TopUsage(registry)
        jains_index = Gauge(prefix + "jains_index", "Fairness among tenants, last minutes.", registry=registry)
        jains_index.set_function(self.shares.jains_index)
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Make series of zero, so that rates and alerts see the first of each outcome."""
        for outcome in ("ok", "time_limit", "failed"):
            self.resumes.labels(outcome)
        for outcome in ("continued", "ended", "refused"):
            self.client_resumes.labels(outcome)

    def watch_queue(self, sizes: Callable[[], dict[int, int]]) -> None:
        """Read the queue's sizes by priority from here on."""
        for priority in Priority:
            gauge = self.queue_size.labels(priority.name.lower())
            gauge.set_function(lambda priority=priority: sizes().get(priority, 0))  # type: ignore[misc]

    def adapter_label(self, name: str, *, is_restricted: bool) -> str:
        """Return an adapter as a label: capped, and `private` if its use is restricted."""
        return self._adapter_label(private(name) if is_restricted else name)

    def count_tokens(self, tenant: str, *, num_input: int, num_output: int, num_cached: int) -> None:
        """Count the tokens of a request that ended."""
        label = self._tenant(tenant)
        for kind, count in (("input", num_input), ("output", num_output), ("cached", num_cached)):
            self.tokens.labels(label, kind).inc(count)
        weighted = num_input + OUTPUT_WEIGHT * num_output
        self.fairness.labels(label).inc(weighted)
        self.shares.add(label, weighted)

    def count_resolution(self, outcome: str) -> None:
        """Count an adapter that a request named by its source."""
        self.resolutions.labels(outcome).inc()

    def count_quota_refusal(self, tenant: str, limit: str) -> None:
        """Count a call that a limit (key of the quotas file) refused."""
        self.quota_refusals.labels(self._tenant(tenant), limit).inc()

    def _tenant(self, name: str) -> str:
        return name if name == ANYBODY.name else self._tenant_label(private(name))
