"""The engine's configuration: one frozen value, read once at start and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from loraplex_common.log import LogFormat
from loraplex_common.secret import Secret
from loraplex_common.service_settings import ServiceSettings, require_identity, valkey_url
from loraplex_common.settings import secret, setting, size
from loraplex_common.sizes import size_as_flag
from loraplex_common.token_rows import MOST_ADDED_TOKENS

from loraplex_engine.constraints.limits import COMPILE_TIMEOUT_S, MAX_CACHE_BYTES, MAX_TEXT_BYTES
from loraplex_engine.limits import (
    ARENA_BYTES,
    CPU_POOL_BYTES,
    CPU_STEP,
    DEFAULT_GROWTH_QUANTILE,
    DEFAULT_HALF_LIFE_S,
    DEFAULT_PROMOTE_AFTER_S,
    GPU_STEP,
    MAX_ADDED_TOKENS,
    MAX_BACKLOG_BYTES,
    MAX_BACKLOG_S,
    STEP_PATIENCE_S,
)

DtypeName = Literal["auto", "float32", "bfloat16"]
KvCacheDtypeName = Literal["auto", "fp8"]
DeviceName = Literal["auto", "cpu", "cuda"]
BackendName = Literal["auto", "torch", "cuda"]
QuantizationName = Literal["auto", "fp8", "none"]
AdapterSplitName = Literal["auto", "whole", "divided"]
QueuePolicyName = Literal["fcfs", "slo-abort", "newest-first"]
_CHOICES: Final[dict[str, Any]] = {
    "dtype": DtypeName,
    "quantization": QuantizationName,
    "kv_cache_dtype": KvCacheDtypeName,
    "device": DeviceName,
    "backend": BackendName,
    "adapter_split": AdapterSplitName,
}


class ConfigError(ValueError):
    """A setting cannot work; the message names the flag and what would."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig(ServiceSettings):
    """Serve one base model and any number of LoRA adapters of it on one device.

    Each field is a flag; its ``help`` says what it means. Fields that are None take what suits the model and the device
    (`build`).
    """

    model: Path = setting(help="base model in Hugging Face layout, or ORG/NAME[@COMMIT] of the hub", metavar="DIR")
    served_model_name: str | None = setting(None, help="name clients use (default: the directory's name)")
    model_alias: tuple[str, ...] = setting(
        (), help="further name under which adapters may name the base, e.g. its hub id"
    )
    text_only: bool = setting(False, help="serve the text part of a multimodal model, without images")
    redis_url: str | None = valkey_url(
        None, help="Valkey or Redis to register in (default: none, gateways must know the address)"
    )
    store_target: str | None = setting(
        None,
        help="adapter store, or its replicas separated by commas (default: none, only the base model and what the arena holds)",
        metavar="HOST:PORT",
    )
    host: str = setting("127.0.0.1", help="address to listen on")
    port: int = setting(8520, help="gRPC port, 0 picks a free one")
    advertise: str | None = setting(None, help="address for gateways (default: what is bound)", metavar="HOST[:PORT]")
    metrics_port: int = setting(8521, help="HTTP port of /metrics, 0 picks a free one")
    metrics_key: Secret | None = secret(
        help="the key that lets a scraper see restricted adapters, as do API keys of the roles admin and metrics"
    )
    store_tls_name: str | None = setting(
        None, help="name in the adapter store's certificate (default: its host)", metavar="NAME"
    )
    allow_anonymous: bool = setting(False, help="listen on a network without --api-keys-file")
    max_connection_age_s: float = setting(
        1800.0,
        help="time after which a connection takes no further calls, so that peers dial anew; open sessions go on; 0 for never",
    )
    enable_reflection: bool = setting(False, help="serve gRPC reflection")
    max_model_len: int | None = setting(None, help="longest sequence in tokens (default: the model's own limit)")
    max_num_seqs: int | None = setting(
        None, help=f"most sequences of one step (default: {CPU_STEP[0]} on a CPU, {GPU_STEP[0]} on a GPU)"
    )
    max_num_batched_tokens: int | None = setting(
        None, help=f"most tokens of one step (default: {CPU_STEP[1]} on a CPU, {GPU_STEP[1]} on a GPU)"
    )
    pool_bytes: int | None = size(
        None,
        help=f"device memory of each rank's page pool (default: {size_as_flag(CPU_POOL_BYTES)} on a CPU, on a GPU most of what the "
        "weights leave)",
    )
    arena_bytes: int = size(ARENA_BYTES, help="host memory for adapter images")
    max_added_tokens: int = setting(
        MAX_ADDED_TOKENS, help="most tokens that an adapter may add behind the base model's vocabulary; 0 for none"
    )
    dtype: DtypeName = setting("auto", help="compute type; auto is float32 on a CPU, bfloat16 on a GPU")
    quantization: QuantizationName = setting(
        "auto",
        help="auto keeps an FP8 checkpoint in FP8 where the GPU multiplies it, fp8 quantises any checkpoint on load, none "
        "unpacks (docs/stored-forms.md)",
    )
    kv_cache_dtype: KvCacheDtypeName = setting(
        "auto",
        help="type of keys and values; auto is the compute type, fp8 is e4m3 with a scale for each token and head",
    )
    device: DeviceName = setting("auto", help="where to compute; auto is the GPU if there is one")
    backend: BackendName = setting("auto", help="what computes; auto is our kernels on a GPU, torch on a CPU")
    tensor_parallel: int = setting(
        1, help="processes that compute the model together, each with a part of every weight (docs/tensor_parallel.md)"
    )
    adapter_split: AdapterSplitName = setting(
        "auto",
        help="factor of an adapter's pair that each rank could have whole: whole, divided (a collective more), or auto, the "
        "faster in each step (docs/tensor_parallel.md)",
    )
    num_threads: int | None = setting(
        None,
        help="compute threads on a CPU, of each tensor-parallel rank (default: all cores, divided among the ranks)",
    )
    log_level: str = setting("info", help="debug, info, warning or error")
    log_format: LogFormat = setting("console", help="log lines for people or for collectors")
    store_wait_s: float = setting(30.0, help="longest wait for an adapter while the store is away or says nothing")
    session_grace_s: float = setting(2.0, help="how long requests of a lost session go on before they are aborted")
    load_report_s: float = setting(1.0, help="longest silence on a session: a load report is sent at least this often")
    residency_events: int = setting(1024, help="residency changes that WatchAdapters can go back")
    outbox_max_bytes: int = size(MAX_BACKLOG_BYTES, help="unread output of a session at which it is aborted")
    outbox_max_age_s: float = setting(MAX_BACKLOG_S, help="age of unread output at which its session is aborted")
    step_patience_s: float = setting(
        STEP_PATIENCE_S,
        help="a step that takes longer than this, and than five times what it should, hangs and the engine ends; 0 for never",
    )
    prefix_cache: bool = setting(True, help="share computed blocks among requests of equal adapter, tokens and salt")
    warm_adapters: bool = setting(True, help="load likely adapters before a request asks, into idle room")
    half_life_s: float = setting(
        DEFAULT_HALF_LIFE_S, help="time after which a use of a prefix or an adapter counts half"
    )
    growth_quantile: float = setting(
        DEFAULT_GROWTH_QUANTILE,
        help="quantile of recent output lengths that admission expects requests to grow to; 0 expects no growth",
    )
    queue_policy: QueuePolicyName = setting(
        "fcfs", help="fcfs, slo-abort or newest-first: which request goes first, which ends early (docs/scheduling.md)"
    )
    ttft_slo_s: float | None = setting(
        None, help="objective for the time to the first token, for the policies that use one"
    )
    max_running_per_key: int | None = setting(None, help="most requests of one fairness key at once (default: any)")
    promote_after_s: float = setting(
        DEFAULT_PROMOTE_AFTER_S, help="waiting time after which a request rises a class of service"
    )
    constraint_max_bytes: int = size(MAX_TEXT_BYTES, help="longest schema, pattern or grammar of a structured output")
    constraint_cache_bytes: int = size(MAX_CACHE_BYTES, help="memory of compiled constraints that are kept for reuse")
    constraint_compile_s: float = setting(
        COMPILE_TIMEOUT_S, help="processor time after which a constraint is refused for what it takes to compile"
    )
    compact_json: bool = setting(False, help="write the JSON of structured outputs without blanks")
    drain_settle_s: float = setting(0.5, help="pause between NOT_SERVING and refusing connections")
    drain_grace_s: float = setting(30.0, help="how long running requests may go on once the engine drains")

    def __post_init__(self) -> None:
        for name in (
            "arena_bytes",
            "residency_events",
            "outbox_max_bytes",
            "constraint_max_bytes",
            "constraint_compile_s",
        ):
            _require(getattr(self, name) > 0, f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "pool_bytes", "num_threads")
        for name in (*sizes, "ttft_slo_s", "max_running_per_key"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"--{name.replace('_', '-')} must be positive, not {value}")
        _require(self.tensor_parallel > 0, f"--tensor-parallel must be positive, not {self.tensor_parallel}")
        _require(
            self.adapter_split == "auto" or self.tensor_parallel > 1,
            f"--adapter-split {self.adapter_split} needs --tensor-parallel 2 or more: one rank has all factors whole",
        )
        for name in ("port", "metrics_port"):
            _require(0 <= getattr(self, name) <= 65535, f"--{name.replace('_', '-')} {getattr(self, name)} is no port")
        for name in (
            "store_wait_s",
            "constraint_cache_bytes",
            "session_grace_s",
            "step_patience_s",
            "drain_settle_s",
            "drain_grace_s",
            "max_connection_age_s",
        ):
            _require(getattr(self, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
        _require(self.load_report_s > 0, "--load-report-s must be positive")
        _require(
            0 <= self.max_added_tokens <= MOST_ADDED_TOKENS,
            f"--max-added-tokens {self.max_added_tokens} is not in [0, {MOST_ADDED_TOKENS}]",
        )
        self._check_callers()
        self._check_policy()
        self._check_choices()
        _require(self.backend != "cuda" or self.device != "cpu", "--backend cuda needs --device cuda or auto")

    def _check_choices(self) -> None:
        for name, kinds in _CHOICES.items():
            value = getattr(self, name)
            _require(value in get_args(kinds), f"--{name.replace('_', '-')} {value!r} is not one of {get_args(kinds)}")

    def _check_callers(self) -> None:
        try:
            self.check_identity(self.redis_url)
            self.check_store(self.store_target, self.store_tls_name)
            require_identity(self.host, self.api_keys_file, allow_anonymous=self.allow_anonymous)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _check_policy(self) -> None:
        for name in ("half_life_s", "promote_after_s"):
            _require(getattr(self, name) > 0, f"--{name.replace('_', '-')} must be positive")
        _require(0 <= self.growth_quantile <= 1, f"--growth-quantile {self.growth_quantile} is not between 0 and 1")
        policies = get_args(QueuePolicyName)
        _require(self.queue_policy in policies, f"--queue-policy {self.queue_policy!r} is not one of {policies}")
        _require(
            self.queue_policy == "fcfs" or self.ttft_slo_s is not None,
            f"--queue-policy {self.queue_policy} needs --ttft-slo-s",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
