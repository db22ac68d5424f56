"""The gateway's configuration: one frozen value, read once at start and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraplex_common.log import LogFormat
from loraplex_common.settings import setting


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """Serve text generation over gRPC and OpenAI-compatible HTTP.

    Attributes:
        model: Base models in Hugging Face layout; tokenizer and chat template are read from there.
        served_model_name: Name of the first model; its directory's name if None.
        model_alias: Other names of the first model, e.g. its hub id.
        redis_url: Valkey or Redis with the engine registry and the request claims.
        store_target: ``host:port`` of the adapter store; None serves base models alone.
        store_api_key: Sent to an adapter store that asks for keys; it needs the admin right to see every tenant's names.
        store_tls_ca: Authority of the adapter store's certificate; turns TLS towards it on.
        api_keys_file: ``KEY TENANT [admin]`` lines; None lets everybody in as tenant ``default``.
        quotas_file: What tenants may use, see `loraplex_common.quotas_file`; None limits nobody.
        metrics_key: Shows scrapers that send it restricted adapters and tenants; an administrator's API key does, too.
        max_concurrent_requests: Most requests on engines at once.
        max_queued_requests: Most requests waiting here beyond them.
        max_stream_s: Deadline of requests that come without one, and the longest that any may ask for.
        max_connections: Most connections at once, of gRPC and of HTTP each; fewer where descriptors are short.
        max_prompt_bytes_per_token: Text of more bytes than this x the longest sequence is refused before it is tokenised.
        engine_silence_s: An engine without a message for so long is lost, whatever its connection; its streams move.
        failover_wait_s: How long a request that has lost its engine waits for one that was lost, drains or is dialled.
        max_buffered_tokens: Unread output of one client at which its request is ended.
        slow_client_s: Longest time that one write to a client may wait.
        drain_settle_s: Between NOT_SERVING and refusing new calls, for balancers to notice.
        drain_grace_s: How long running streams may go on once the gateway drains.
    """

    model: tuple[Path, ...] = setting(help="base model in Hugging Face layout (repeat for several)", metavar="DIR")
    served_model_name: str | None = setting(None, help="name of the first model (default: its directory's name)")
    model_alias: tuple[str, ...] = setting((), help="further name of the first model (repeat for several)")
    redis_url: str = setting(help="Valkey or Redis with the engine registry", is_secret=True)
    store_target: str | None = setting(None, help="adapter store", metavar="HOST:PORT")
    store_api_key: str | None = setting(None, help="API key for the adapter store", is_secret=True)
    store_tls_ca: Path | None = setting(None, help="trust the adapter store's certificate by this, PEM", metavar="FILE")
    host: str = setting("127.0.0.1", help="address to listen on")
    port: int = setting(8500, help="gRPC port, 0 picks a free one")
    http_port: int = setting(8501, help="port of the OpenAI-compatible API and /metrics, 0 picks a free one")
    api_keys_file: Path | None = setting(None, help="'KEY TENANT [admin]' lines", metavar="FILE")
    quotas_file: Path | None = setting(None, help="limits of tenants, TOML; see docs/quotas.md", metavar="FILE")
    tls_cert: Path | None = setting(None, help="server certificate chain, PEM", metavar="FILE")
    tls_key: Path | None = setting(None, help="its private key, PEM", metavar="FILE")
    tls_client_ca: Path | None = setting(None, help="require client certificates of this authority", metavar="FILE")
    metrics_key: str | None = setting(
        None, help="API key that lets a scraper see restricted adapters and tenants", is_secret=True, metavar="KEY"
    )
    enable_reflection: bool = setting(False, help="serve gRPC reflection")
    max_concurrent_requests: int = setting(2048, help="most requests on engines at once")
    max_queued_requests: int = setting(2048, help="most requests waiting here beyond them")
    max_stream_s: float = setting(3600.0, help="longest deadline of a request")
    max_connections: int = setting(8192, help="most connections at once, of gRPC and of HTTP each")
    max_prompt_bytes_per_token: int = setting(
        16, help="a prompt's bytes are at most this x the longest sequence's tokens; longer text is not tokenised"
    )
    engine_silence_s: float = setting(5.0, help="time without a message after which an engine is lost")
    failover_wait_s: float = setting(60.0, help="how long a lost engine is expected back by requests it had")
    max_buffered_tokens: int = setting(4096, help="unread tokens of one client at which its request is ended")
    slow_client_s: float = setting(30.0, help="longest time that one write to a client may wait")
    log_level: str = setting("info", help="debug, info, warning or error")
    log_format: LogFormat = setting("console", help="log lines for people or for collectors")
    drain_settle_s: float = setting(0.5, help="pause between NOT_SERVING and refusing new calls")
    drain_grace_s: float = setting(30.0, help="how long running streams may go on once the gateway drains")

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("--model is required: the gateway tokenises")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        for name in ("port", "http_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is no port")
        positive = (
            "max_concurrent_requests",
            "max_stream_s",
            "max_buffered_tokens",
            "slow_client_s",
            "engine_silence_s",
        )
        for name in (*positive, "max_prompt_bytes_per_token", "max_connections"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        for name in ("max_queued_requests", "failover_wait_s", "drain_settle_s", "drain_grace_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
