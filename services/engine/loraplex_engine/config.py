"""The engine's configuration: one frozen value, read once at start and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

DtypeName = Literal["auto", "float32", "bfloat16"]
DeviceName = Literal["auto", "cpu", "cuda"]

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB


class ConfigError(ValueError):
    """A setting cannot work; the message names the flag and what would."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Everything the engine can be told.

    Attributes:
        model: Base model in Hugging Face layout.
        served_model_name: Name clients use; the directory's name if None.
        model_aliases: Other names under which adapters may name the base, e.g. its hub id.
        redis_url: Valkey or Redis to register in; None serves only those who know the address.
        store_target: ``host:port`` of the adapter store; None serves the base model and what the arena was given.
        host: Address to listen on.
        port: gRPC port; 0 picks a free one.
        advertise: ``host`` or ``host:port`` under which gateways reach this engine; None means what is bound.
        metrics_port: HTTP port of /metrics; 0 picks a free one.
        max_model_len: Longest sequence in tokens; None means what the model was trained for.
        max_num_seqs: Most sequences of one step.
        max_num_batched_tokens: Most tokens of one step.
        pool_bytes: Device memory of the page pool; None means 1 GiB on a CPU, on a GPU most of what the weights leave.
        arena_bytes: Host memory for adapter images behind the pool.
        dtype: Compute type; auto is float32 on a CPU and bfloat16 on a GPU.
        device: Where to compute; auto is the GPU if there is one.
        num_threads: Threads of the compute backend on a CPU; None means all cores.
        store_wait_s: Longest wait of a request for an adapter while the store cannot be reached.
        session_grace_s: How long requests of a lost session go on before they are aborted.
        load_report_s: Longest silence on a session; a LoadReport is sent at least this often.
        residency_events: How many residency changes WatchAdapters can go back.
        outbox_max_bytes: Unread output of one session at which it is aborted.
        outbox_max_age_s: Age of unread output at which its session is aborted.
        drain_settle_s: Between NOT_SERVING and refusing connections, for balancers to notice.
        drain_grace_s: How long running requests may go on once the engine drains.
    """

    model: Path
    served_model_name: str | None = None
    model_aliases: tuple[str, ...] = ()
    redis_url: str | None = None
    store_target: str | None = None
    host: str = "127.0.0.1"
    port: int = 8520
    advertise: str | None = None
    metrics_port: int = 8521
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    pool_bytes: int | None = None
    arena_bytes: int = 512 * MIB
    dtype: DtypeName = "auto"
    device: DeviceName = "auto"
    num_threads: int | None = None
    log_level: str = "info"
    store_wait_s: float = 30.0
    session_grace_s: float = 2.0
    load_report_s: float = 1.0
    residency_events: int = 1024
    outbox_max_bytes: int = 8 * MIB
    outbox_max_age_s: float = 5.0
    drain_settle_s: float = 0.5
    drain_grace_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "arena_bytes", "residency_events", "outbox_max_bytes"):
            _require(getattr(self, name) > 0, f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        for name in ("max_model_len", "pool_bytes", "num_threads"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"--{name.replace('_', '-')} must be positive, not {value}")
        for name in ("port", "metrics_port"):
            _require(0 <= getattr(self, name) <= 65535, f"--{name.replace('_', '-')} {getattr(self, name)} is no port")
        for name in ("store_wait_s", "session_grace_s", "drain_settle_s", "drain_grace_s"):
            _require(getattr(self, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
        _require(self.load_report_s > 0, "--load-report-s must be positive")
        _require(self.dtype in get_args(DtypeName), f"--dtype {self.dtype!r} is not one of {get_args(DtypeName)}")
        _require(self.device in get_args(DeviceName), f"--device {self.device!r} is not one of {get_args(DeviceName)}")
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"--max-num-batched-tokens {self.max_num_batched_tokens} is less than --max-num-seqs {self.max_num_seqs}: "
            "each running sequence takes one token of every step",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
