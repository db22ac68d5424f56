"""What ``loraplex serve`` starts, and with which arguments."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loraplex_client.serve.child import ServiceSpec
from loraplex_client.serve.ports import engine_port
from loraplex_client.serve.shares import EngineShare
from loraplex_client.valkey_access import ValkeyAccess


def default_data_dir() -> Path:
    """Return where imported adapters are kept: ``$XDG_DATA_HOME/loraplex``, else ``~/.local/share/loraplex``."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base).expanduser() / "loraplex"


class PartFlags(Protocol):
    """What each part is started with to prove itself; see `ServeIdentity`, which needs the extra ``credentials``."""

    def store_flags(self) -> tuple[str, ...]:
        """Return the adapter store's."""

    def engine_flags(self) -> tuple[str, ...]:
        """Return the engine's."""

    def gateway_flags(self) -> tuple[str, ...]:
        """Return the gateway's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """What connects the parts of one run."""

    valkey: ValkeyAccess
    identity: PartFlags


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """One machine's stack.

    Attributes:
        model: Base model in Hugging Face layout.
        data_dir: Keeps the embedded Valkey's data and the logs of all parts.
        valkey: Valkey or Redis to use; None starts an embedded one.
        host: Address the gateway listens on; engine and store stay on the loopback.
        grpc_port: The gateway's gRPC port. 0 picks a free one, as for every port.
        http_port: The gateway's OpenAI-compatible port.
        metrics_port: The gateway's HTTP port of /metrics.
        store_port: The adapter store's gRPC port.
        engine_port: The engine's gRPC port; of several, the first's.
        store_metrics_port: The adapter store's HTTP port of /metrics.
        engine_metrics_port: The engine's HTTP port of /metrics; of several, the first's.
        import_roots: Folders below which the store imports directories.
        drain_grace_s: How long running requests may go on after Ctrl-C, in seconds.
        metrics_key: Shows scrapers that send it what is private.
        metrics_key_file: Holds that key instead; read again when it changes.
        user_keys: Keys file of the users that may call the gateway.
        certificate_lifetime_s: How long the parts' certificates are good, in seconds; renewed well before.
        base_args: Arguments that all services get, such as the base model's name.
        engine_args: Further arguments of every engine.
        engine_shares: What each engine gets of the machine; as many engines run.
        gateway_args: Further arguments of the gateway.
        store_args: Further arguments of the adapter store.
    """

    model: Path
    data_dir: Path
    valkey: ValkeyAccess | None = None
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
    metrics_key_file: Path | None = None
    user_keys: Path | None = None
    certificate_lifetime_s: float = 30 * 86400.0
    base_args: tuple[str, ...] = ()
    engine_args: tuple[str, ...] = ()
    engine_shares: tuple[EngineShare, ...] = (EngineShare(),)
    gateway_args: tuple[str, ...] = ()
    store_args: tuple[str, ...] = field(default=())

    def store(self, wiring: Wiring) -> ServiceSpec:
        """Return how to run the adapter store."""
        roots = (word for root in self.import_roots for word in ("--import-root", str(root)))
        return ServiceSpec(
            name="adapter_store",
            module="loraplex_adapter_store",
            arguments=(*self._shared(), *roots, *wiring.identity.store_flags(), *self.store_args),
            ports={"grpc": ("--port", self.store_port), "metrics": ("--metrics-port", self.store_metrics_port)},
            environment=self._environment("adapter_store", wiring),
        )

    def engine(self, wiring: Wiring, store_target: str, number: int = 0) -> ServiceSpec:
        """Return how to run the engine with this number; a lone one is just called the engine."""
        share = self.engine_shares[number]
        ports = {"grpc": ("--port", self.engine_port), "metrics": ("--metrics-port", self.engine_metrics_port)}
        return ServiceSpec(
            name="engine" if len(self.engine_shares) == 1 else f"engine-{number}",
            module="loraplex_engine",
            arguments=(
                *self._shared(),
                *("--store-target", store_target),
                *wiring.identity.engine_flags(),
                *self.engine_args,
                *share.arguments,
            ),
            ports={kind: (flag, engine_port(first, number)) for kind, (flag, first) in ports.items()},
            environment={  # only the store reaches out
                "HF_HUB_OFFLINE": "1",
                **self._environment("engine", wiring),
                **share.environment,
            },
        )

    def gateway(self, wiring: Wiring, store_target: str) -> ServiceSpec:
        """Return how to run the gateway."""
        return ServiceSpec(
            name="gateway",
            module="loraplex_gateway",
            arguments=(
                *self._shared(),
                *("--store-target", store_target, "--host", self.host),
                *wiring.identity.gateway_flags(),
                *self.gateway_args,
            ),
            ports={
                "grpc": ("--port", self.grpc_port),
                "http": ("--http-port", self.http_port),
                "metrics": ("--metrics-port", self.metrics_port),
            },
            environment=self._environment("gateway", wiring),
        )

    def _environment(self, service: str, wiring: Wiring) -> dict[str, str]:
        """Return what may hold a secret: other users do not see a process's environment, but its command line."""
        values = {
            "REDIS_URL": wiring.valkey.url,
            "REDIS_PASSWORD_FILE": wiring.valkey.password_file,
            "REDIS_TLS_CA": wiring.valkey.tls_ca,
            "METRICS_KEY": self.metrics_key,
            "METRICS_KEY_FILE": self.metrics_key_file,
        }
        prefix = f"LORAPLEX_{service.upper()}_"
        return {prefix + name: str(value) for name, value in values.items() if value is not None}

    def _shared(self) -> tuple[str, ...]:
        return (
            *("--model", str(self.model)),
            *("--log-level", self.log_level, "--drain-grace-s", str(self.drain_grace_s)),
            *self.base_args,
        )
