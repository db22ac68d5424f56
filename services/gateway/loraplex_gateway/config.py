"""The gateway's configuration: one frozen value, read once at start and passed down."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex_common.log import LogFormat
from loraplex_common.secret import Secret
from loraplex_common.service_settings import ServiceSettings, valkey_url
from loraplex_common.settings import secret, setting

ANY_ORIGIN: Final = "*"
ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[A-Za-z0-9.\[\]:_-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig(ServiceSettings):
    """Serve text generation over gRPC and OpenAI-compatible HTTP.

    Attributes:
        model: Base models in Hugging Face layout; tokenizer and chat template are read from there.
        served_model_name: Name of the first model; its directory's name if None.
        model_alias: Other names of the first model, e.g. its hub id.
        text_only: Serve the text part of a multimodal model; without it, one is refused.
        redis_url: Valkey or Redis with the engine registry and the request claims.
        store_target: ``host:port`` of the adapter store, or of its replicas separated by commas; None serves base models alone.
        engine_tls_name: What engines' certificates must be for; None means the host that each is dialled at.
        store_tls_name: What the adapter store's certificate must be for; None means its host.
        quotas_file: What tenants may use, see `loraplex_common.quotas_file`; None sets no limits.
        cors_allow_origin: Web pages of these origins may read answers of the HTTP port; ``*`` means all.
        ui: Whether the HTTP port has the page at /ui: page pools, requests, imports and a playground.
        workers: Processes that share the two ports for clients; limits and memory are each one's own.
        metrics_port: Port of /metrics, for scrapers: it shows what no client needs to know.
        metrics_key: Shows scrapers that send it restricted adapters and tenants, as do the API keys of the roles admin
            and metrics.
        max_concurrent_requests: Most requests on engines at once.
        max_queued_requests: Most requests waiting here beyond them.
        max_resolving_requests: Most requests that wait for an adapter which they name by its source.
        max_stream_s: Deadline of requests that come without one, and the longest that any may ask for.
        max_connections: Most connections at once, of gRPC and of HTTP each; fewer where descriptors are short.
        max_connection_age_s: Time after which a connection takes no further requests; those under way end undisturbed.
        max_prompt_bytes_per_token: Text of more bytes than this x the longest sequence is refused before it is tokenised.
        allow_request_chat_template: Whether a chat may bring a template of its own: a program of the client's, in a sandbox
            that bounds what it reaches, not how long it runs. For trusted clients only.
        resume_key_file: Keys of at least 32 characters, one a line, that seal resume tokens: the first seals, all of them open.
            Read again when it changes. None: the gateways agree on a key in Valkey.
        resume_window_s: How long after its start a client may resume a broken stream; 0 turns that off.
        usage_records: About how many records of requests' usage Valkey keeps for `loraplex usage`; 0 keeps none.
        engine_silence_s: An engine without a message for so long is lost, whatever its connection; its streams move.
        failover_wait_s: How long a request that has lost its engine waits for one that was lost, drains or is dialled.
        scale_from_zero_s: How long a new request waits for an engine where none of its base model is there; with more than 0 the
            gateway is ready without engines, so that an autoscaler which asks it may start the first.
        max_buffered_tokens: Unread output of one client at which its request is ended.
        slow_client_s: Longest time that one write to a client may wait.
        drain_settle_s: Between NOT_SERVING and refusing new calls, for balancers to notice.
        drain_grace_s: How long running streams may go on once the gateway drains.
    """

    model: tuple[Path, ...] = setting(
        help="base model in Hugging Face layout, or ORG/NAME[@COMMIT] of the hub (repeat for several)", metavar="DIR"
    )
    served_model_name: str | None = setting(None, help="name of the first model (default: its directory's name)")
    model_alias: tuple[str, ...] = setting((), help="further name of the first model (repeat for several)")
    text_only: bool = setting(False, help="serve the text part of a multimodal model, without images")
    redis_url: str = valkey_url(help="Valkey or Redis with the engine registry")
    store_target: str | None = setting(
        None, help="adapter store, or its replicas separated by commas", metavar="HOST:PORT"
    )
    engine_tls_name: str | None = setting(
        None, help="name in engines' certificates (default: the host dialled)", metavar="NAME"
    )
    store_tls_name: str | None = setting(
        None, help="name in the adapter store's certificate (default: its host)", metavar="NAME"
    )
    host: str = setting("127.0.0.1", help="address to listen on")
    port: int = setting(8500, help="gRPC port, 0 picks a free one")
    http_port: int = setting(8501, help="port of the OpenAI-compatible API, 0 picks a free one")
    cors_allow_origin: tuple[str, ...] = setting(
        (), help="let web pages of this origin call the HTTP port, * for all (repeat for several)", metavar="ORIGIN"
    )
    ui: bool = setting(False, help="show the page at /ui on the HTTP port; see docs/ui.md")
    workers: int = setting(1, help="processes that share the gRPC and the HTTP port; limits count for each")
    metrics_port: int = setting(8502, help="HTTP port of /metrics, 0 picks a free one")
    metrics_key: Secret | None = secret(help="the key that lets a scraper see restricted adapters and tenants")
    quotas_file: Path | None = setting(None, help="limits of tenants, TOML; see docs/quotas.md", metavar="FILE")
    enable_reflection: bool = setting(False, help="serve gRPC reflection")
    max_concurrent_requests: int = setting(2048, help="most requests on engines at once")
    max_queued_requests: int = setting(2048, help="most requests waiting here beyond them")
    max_resolving_requests: int = setting(
        256, help="most requests that wait for an adapter which they name by its source; half of them of one tenant"
    )
    max_stream_s: float = setting(3600.0, help="longest deadline of a request")
    max_connections: int = setting(8192, help="most connections at once, of gRPC and of HTTP each")
    max_connection_age_s: float = setting(
        1800.0, help="time after which a connection takes no further requests, so that clients dial anew; 0 for never"
    )
    max_prompt_bytes_per_token: int = setting(
        16, help="a prompt's bytes are at most this x the longest sequence's tokens; longer text is not tokenised"
    )
    allow_request_chat_template: bool = setting(False, help="take chat templates from (trusted) clients' requests")
    resume_key_file: Path | None = setting(
        None, help="keys that seal resume tokens, one a line (default: agreed on in Valkey)", metavar="FILE"
    )
    resume_window_s: float = setting(
        3600.0, help="how long after its start a broken stream may be resumed, 0 for never"
    )
    usage_records: int = setting(100_000, help="records of requests' usage to keep in Valkey, 0 for none")
    engine_silence_s: float = setting(5.0, help="time without a message after which an engine is lost")
    allow_mixed_numerics: bool = setting(
        False,
        help="send requests of a base model to engines whose numerics differ (--dtype, quantisation ...), and go on there",
    )
    failover_wait_s: float = setting(60.0, help="how long a lost engine is expected back by requests it had")
    scale_from_zero_s: float = setting(
        0.0, help="how long new requests wait where no engine is there, for an autoscaler to start one; 0 refuses them"
    )
    max_buffered_tokens: int = setting(4096, help="unread tokens of one client at which its request is ended")
    slow_client_s: float = setting(30.0, help="longest time that one write to a client may wait")
    log_level: str = setting("info", help="debug, info, warning or error")
    log_format: LogFormat = setting("console", help="log lines for people or for collectors")
    drain_settle_s: float = setting(0.5, help="pause between NOT_SERVING and refusing new calls")
    drain_grace_s: float = setting(30.0, help="how long running streams may go on once the gateway drains")

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("--model is required: the gateway tokenises")
        self.check_identity(self.redis_url)
        self.check_store(self.store_target, self.store_tls_name)
        for origin in self.cors_allow_origin:
            if origin != ANY_ORIGIN and ORIGIN.fullmatch(origin) is None:
                raise ValueError(f"--cors-allow-origin {origin!r}: write scheme://host[:port] without a path, or *")
        for name in ("port", "http_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is no port")
        positive = (
            "max_concurrent_requests",
            "max_resolving_requests",
            "max_stream_s",
            "max_buffered_tokens",
            "slow_client_s",
            "engine_silence_s",
        )
        for name in (*positive, "max_prompt_bytes_per_token", "max_connections", "workers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        for name in (
            "max_queued_requests",
            "usage_records",
            "resume_window_s",
            "failover_wait_s",
            "scale_from_zero_s",
            "max_connection_age_s",
            "drain_settle_s",
            "drain_grace_s",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
