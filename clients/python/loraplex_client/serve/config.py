"""What ``loraplex serve`` starts, and with which arguments."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from loraplex_client.serve.child import ServiceSpec


def default_data_dir() -> Path:
    """Return where imported adapters are kept: ``$XDG_DATA_HOME/loraplex``, else ``~/.local/share/loraplex``."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base).expanduser() / "loraplex"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """One machine's stack.

    Attributes:
        model: Base model in Hugging Face layout.
        data_dir: Keeps the embedded Valkey's data and everyone's logs.
        redis_url: Valkey or Redis to use; None starts an embedded one.
        host: Address the gateway listens on; engine and store stay on the loopback.
        grpc_port: The gateway's gRPC port. 0 picks a free one, as for every port.
        http_port: The gateway's OpenAI-compatible port.
        metrics_port: The gateway's HTTP port of /metrics.
        store_port: The adapter store's gRPC port.
        engine_port: The engine's gRPC port.
        store_metrics_port: The adapter store's HTTP port of /metrics.
        engine_metrics_port: The engine's HTTP port of /metrics.
        import_roots: Folders below which the store imports directories.
        drain_grace_s: How long running requests may go on after Ctrl-C, in seconds.
        metrics_key: Shows scrapers that send it what is private; handed on in the environment, which no process list shows.
        base_args: Arguments that all services get, such as the base model's name.
        engine_args: Further arguments of the engine.
        gateway_args: Further arguments of the gateway.
        store_args: Further arguments of the adapter store.
    """

    model: Path
    data_dir: Path
    redis_url: str | None = None
    host: str = "127.0.0.1"
    grpc_port: int = 8500
    http_port: int = 8501
    metrics_port: int = 8502
    store_port: int = 8510
    store_metrics_port: int = 8511
    engine_port: int = 8520
    engine_metrics_port: int = 8521
    import_roots: tuple[Path, ...] = ()
    drain_grace_s: float = 10.0
    log_level: str = "info"
    metrics_key: str | None = None
    base_args: tuple[str, ...] = ()
    engine_args: tuple[str, ...] = ()
    gateway_args: tuple[str, ...] = ()
    store_args: tuple[str, ...] = field(default=())

    def store(self, redis_url: str) -> ServiceSpec:
        """Return how to run the adapter store."""
        roots = (word for root in self.import_roots for word in ("--import-root", str(root)))
        return ServiceSpec(
            name="adapter_store",
            module="loraplex_adapter_store",
            arguments=(*self._shared(redis_url), *roots, *self.store_args),
            ports={"grpc": ("--port", self.store_port), "metrics": ("--metrics-port", self.store_metrics_port)},
            environment=self._secrets("adapter_store"),
        )

    def engine(self, redis_url: str, store_target: str) -> ServiceSpec:
        """Return how to run the engine."""
        return ServiceSpec(
            name="engine",
            module="loraplex_engine",
            arguments=(*self._shared(redis_url), "--store-target", store_target, *self.engine_args),
            ports={"grpc": ("--port", self.engine_port), "metrics": ("--metrics-port", self.engine_metrics_port)},
            environment={"HF_HUB_OFFLINE": "1", **self._secrets("engine")},  # only the store reaches out
        )

    def gateway(self, redis_url: str, store_target: str) -> ServiceSpec:
        """Return how to run the gateway."""
        return ServiceSpec(
            name="gateway",
            module="loraplex_gateway",
            arguments=(
                *self._shared(redis_url),
                *("--store-target", store_target, "--host", self.host),
                *self.gateway_args,
            ),
            ports={
                "grpc": ("--port", self.grpc_port),
                "http": ("--http-port", self.http_port),
                "metrics": ("--metrics-port", self.metrics_port),
            },
            environment=self._secrets("gateway"),
        )

    def _secrets(self, service: str) -> dict[str, str]:
        return {} if self.metrics_key is None else {f"LORAPLEX_{service.upper()}_METRICS_KEY": self.metrics_key}

    def _shared(self, redis_url: str) -> tuple[str, ...]:
        return (
            *("--model", str(self.model), "--redis-url", redis_url),
            *("--log-level", self.log_level, "--drain-grace-s", str(self.drain_grace_s)),
            *self.base_args,
        )
