"""RPC metrics, with names and buckets of gRPC proposal A66 (in Prometheus spelling)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.tally import TallyCounter, TallyHistogram

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# A66, "Buckets for histograms: latency", in seconds.
LATENCY_BUCKETS: Final = (
    *(0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008),
    *(0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3),
    *(0.4, 0.5, 0.65, 0.8, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
)  # fmt: skip


class RpcMetrics:
    """Counts and times the calls that a server handles, by method and status.

    Args:
        registry: The registry that the metrics are added to; one `RpcMetrics` per registry.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = TallyCounter(
            "grpc_server_call_started_total",
            "RPC attempts started, including those not completed (A66 grpc.server.call.started).",
            ["grpc_method"],
            registry=registry,
        )
        self._duration = TallyHistogram(
            "grpc_server_call_duration_seconds",
            "Time from a call's start to its status (A66 grpc.server.call.duration).",
            ["grpc_method", "grpc_status"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )

    def started(self, method: str) -> None:
        """Count the start of a call; ``method`` is ``package.Service/Method``."""
        self._started.labels(method).inc()

    def finished(self, method: str, status: str, duration_s: float) -> None:
        """Record the end of a call with a status name such as ``OK``."""
        self._duration.labels(method, status).observe(duration_s)
