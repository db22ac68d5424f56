"""Renders the answer to a scrape: the same names, labels and secrets in every service and in every format.

prometheus_client writes the colon of ``vllm:`` as an underscore in the OpenMetrics format, which Prometheus asks for.
Here, names are never rewritten. They are all legal in every format, so no escaping scheme applies to them.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    exposition,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from loraplex_common.auth import SCHEME, Authenticator
from loraplex_common.errors import UnauthenticatedError
from loraplex_common.rights import METRICS_READERS
from loraplex_common.version import package_commit, package_version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

    from prometheus_client.core import Metric
    from prometheus_client.samples import Sample

    from loraplex_common.secret import Secret

VLLM_PREFIX: Final = "vllm:"
OTHER: Final = "other"
"""Replaces a label's values if they are too many, or if the scraper may not see them."""
OPENMETRICS_TYPE: Final = "application/openmetrics-text"
LISTS: Final = frozenset({"running_lora_adapters", "waiting_lora_adapters"})
"""Labels whose value is a comma list."""
_MARK: Final = "\ue000"  # a private-use character, which no adapter's name contains

# This is one more series per counter and histogram, which no dashboard of ours reads.
disable_created_metrics()  # type: ignore[no-untyped-call]


def private(value: str) -> str:
    """Return a label value that only scrapes with a credential show; other scrapes count it as `OTHER`."""
    return _MARK + value


def new_registry(service: str) -> CollectorRegistry:
    """Return a registry with every service's own facts: ``process_*``, ``python_info``, ``loraplex_build_info``."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    info = Gauge(
        "loraplex_build_info", "The software that runs; always 1.", ["service", "version", "commit"], registry=registry
    )
    info.labels(service, package_version(), package_commit()).set(1)
    return registry


class Audience:
    """Decides which scrapes see tenants and the names of restricted adapters.

    Args:
        key: Credential for scrapers; None if there is none.
        authenticator: API keys of the service; keys of the roles admin and metrics are accepted too.
    """

    def __init__(self, key: Secret | None = None, authenticator: Authenticator | None = None) -> None:
        self._key = key
        self._authenticator = authenticator or Authenticator()

    def sees_private(self, authorization: str | None) -> bool:
        """Return whether a scrape with this ``Authorization`` header is shown everything.

        Raises:
            UnauthenticatedError: If credentials are configured and the header has a wrong one.
        """
        if authorization is None:
            return False
        if self._key is not None and _is_bearer_of(self._key.reveal(), authorization):
            return True
        if not self._authenticator.is_open:
            return self._authenticator.authenticate(authorization).role in METRICS_READERS
        if self._key is not None:
            raise UnauthenticatedError("authorization must be 'Bearer KEY' with the metrics key, or be left out")
        return False


@dataclass(frozen=True, slots=True)
class Page:
    """One answer to a scrape."""

    body: bytes
    content_type: str


class Exposition:
    """Renders a registry.

    Args:
        registry: The metrics.
        audience: Decides which scrapes see private values; by default none does.
        vllm_labels: Added to every sample whose name begins with ``vllm:`` and that lacks them.
        refresh: Awaited before each scrape; gathers what the registry shows, where that is not in this process.
    """

    def __init__(
        self,
        registry: CollectorRegistry | Collector,
        *,
        audience: Audience | None = None,
        vllm_labels: Mapping[str, str] | None = None,
        refresh: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.refresh = refresh
        self._registry = registry
        self._audience = audience or Audience()
        self._vllm_labels = dict(vllm_labels or {})

    def render(self, *, accept: str = "", authorization: str | None = None) -> Page:
        """Return the page for these request headers.

        Raises:
            UnauthenticatedError: If credentials are configured and the request has a wrong one.
        """
        view = _View(self._registry, self._vllm_labels, is_open=self._audience.sees_private(authorization))
        if _prefers_openmetrics(accept):
            body: bytes = openmetrics.generate_latest(view, openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
            return Page(body, openmetrics.CONTENT_TYPE_LATEST)
        return Page(exposition.generate_latest(view, openmetrics.ALLOWUTF8), exposition.CONTENT_TYPE_PLAIN_0_0_4)


class _View(Collector):
    """A registry as one scrape sees it."""

    def __init__(
        self, registry: CollectorRegistry | Collector, vllm_labels: Mapping[str, str], *, is_open: bool
    ) -> None:
        self._registry = registry
        self._vllm_labels = vllm_labels
        self._is_open = is_open

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = list(self._samples(metric))
            yield metric

    def _samples(self, metric: Metric) -> Iterable[Sample]:
        added = self._vllm_labels if metric.name.startswith(VLLM_PREFIX) else {}
        if not added and not any(_MARK in value for sample in metric.samples for value in sample.labels.values()):
            return metric.samples
        merged: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
        for sample in metric.samples:
            labels = {**added, **{name: self._value(name, value) for name, value in sample.labels.items()}}
            key = (sample.name, tuple(labels.items()))
            before = merged.get(key)
            value = sample.value if before is None else before.value + sample.value
            merged[key] = sample._replace(labels=labels, value=value)
        return merged.values()

    def _value(self, name: str, value: str) -> str:
        if _MARK not in value:
            return value
        if self._is_open:
            return value.replace(_MARK, "")
        if name in LISTS:
            return ",".join(part for part in value.split(",") if _MARK not in part)
        return OTHER


def _prefers_openmetrics(accept: str) -> bool:
    """Return whether an ``Accept`` header asks for OpenMetrics at least as much as for plain text (RFC 9110, 12.5.1)."""
    weights: dict[str, float] = {}
    for item in accept.split(","):
        media, *parameters = (word.strip().lower() for word in item.split(";"))
        given = [word[2:] for word in parameters if word.startswith("q=")]
        try:
            weight = float(given[0]) if given else 1.0
        except ValueError:
            weight = 0.0
        weights[media] = max(weights.get(media, 0.0), weight)
    return weights.get(OPENMETRICS_TYPE, 0.0) > 0 and weights[OPENMETRICS_TYPE] >= weights.get("text/plain", 0.0)


def _is_bearer_of(key: str, authorization: str) -> bool:
    scheme, given = authorization[: len(SCHEME)], authorization[len(SCHEME) :].strip()
    return scheme.lower() == SCHEME and hmac.compare_digest(given.encode(), key.encode())
