"""The store's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex_common.log import LogFormat
from loraplex_common.secret import Secret
from loraplex_common.sentinel_url import SentinelUrl
from loraplex_common.service_settings import ServiceSettings, require_identity, valkey_url
from loraplex_common.settings import secret, setting, size

from loraplex_adapter_store.imports.registry import Registry
from loraplex_adapter_store.object_storage import Bucket
from loraplex_adapter_store.resolve.rules import ResolveRule

MIB: Final = 1024 * 1024
_POSITIVE: Final = (
    "image_cache_bytes",
    "hot_bytes",
    "image_work_bytes",
    "disk_cache_bytes",
    "max_adapter_bytes",
    "max_concurrent_imports",
    "max_pending_imports",
    "resolve_refusal_s",
    "resolve_pin_s",
    "max_resolving",
    "resolved_bytes",
    "resolved_idle_s",
    "keep_pushed_revisions",
)


def shown_each(items: tuple[object, ...]) -> list[str]:
    """Return a list of settings in the form for the log."""
    return [str(item) for item in items]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig(ServiceSettings):
    """Keeps adapters and feeds engines."""

    model: tuple[Path, ...] = setting(
        help="base model in Hugging Face layout, or ORG/NAME[@COMMIT] of the hub; repeat for several", metavar="DIR"
    )
    served_model_name: str | None = setting(None, help="name of the first base model (default: its directory's)")
    model_alias: tuple[str, ...] = setting((), help="further name of the first base model, e.g. its hub id; repeatable")
    text_only: bool = setting(False, help="know a multimodal model by its text part, without images")
    redis_url: str = valkey_url(help="Valkey or Redis, e.g. redis://127.0.0.1:6379/0 or unix:///path")
    redis_replicas: int | None = setting(
        None,
        help="replicas of Valkey that must have a change on disk before it is acknowledged (default: 1 behind Sentinels, else 0)",
    )
    import_root: tuple[Path, ...] = setting((), help="directory below which file: imports are allowed; repeatable")
    import_bucket: tuple[Bucket, ...] = setting(
        (),
        help="s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&credential=NAME] that s3: imports are allowed from; repeatable",
        parse=Bucket.parse,
        show=shown_each,
        metavar="URL",
    )
    import_registry: tuple[Registry, ...] = setting(
        (),
        help="HOST[:PORT][?credential=NAME] that oci: imports are allowed from, with http:// if without TLS; repeatable",
        parse=Registry.parse,
        show=shown_each,
        metavar="HOST",
    )
    cold_tier: Bucket | None = setting(
        None,
        help="s3://BUCKET/PREFIX[?endpoint=URL&region=NAME&credential=NAME] that keeps all adapters; Valkey keeps copies",
        parse=Bucket.parse,
        show=str,
        metavar="URL",
    )
    hot_bytes: int = size(4096 * MIB, help="with --cold-tier: bytes of copies in Valkey")
    image_cache_bytes: int = size(1024 * MIB, help="host memory for page images")
    image_work_bytes: int = size(1024 * MIB, help="host memory for page images and adapters while images are made")
    disk_cache_dir: Path | None = setting(None, help="directory for images and adapters, so that a restart is warm")
    disk_cache_bytes: int = size(64 * 1024 * MIB, help="bytes of files in --disk-cache-dir")
    resolve_from: tuple[ResolveRule, ...] = setting(
        (),
        help="SOURCE[?tenant=NAME&credential=NAME&base=NAME] below which a request may name an adapter by its source, e.g. "
        "hf:org/ or s3://bucket/folder/; repeatable (default: none)",
        parse=ResolveRule.parse,
        show=shown_each,
        metavar="SOURCE",
    )
    resolve_refusal_s: float = setting(60.0, help="time for which it is remembered that a source cannot be resolved")
    resolve_pin_s: float = setting(
        300.0, help="time for which a source without a commit stays at the one it had when it was looked up"
    )
    max_resolving: int = setting(8, help="sources being resolved at once; a tenant has half of them at most")
    resolved_bytes: int = size(4096 * MIB, help="bytes of adapters resolved at request time; unused ones go first")
    resolved_idle_s: float = setting(
        604800.0, help="time without a request after which an adapter resolved at request time is deleted"
    )
    prepare_images: int = setting(
        32, help="new adapters that may wait until their images are made for the attached engines; 0 makes none ahead"
    )
    max_adapter_bytes: int = size(2048 * MIB, help="largest adapter_model.safetensors accepted")
    keep_pushed_revisions: int = setting(
        4, help="pushed revisions without a label that each name keeps, the newest; engines drop the others"
    )
    max_concurrent_imports: int = setting(2, help="imports at work at once")
    max_pending_imports: int = setting(64, help="imports waiting for their turn")
    host: str = setting("127.0.0.1", help="address to listen on")
    port: int = setting(8510, help="gRPC port; 0 picks a free one")
    metrics_port: int = setting(8511, help="HTTP port of /metrics and /healthz; 0 picks a free one")
    metrics_key: Secret | None = secret(help="the key that lets a scraper see restricted adapters")
    allow_anonymous: bool = setting(False, help="listen on a network without --api-keys-file")
    hf_endpoint: str | None = setting(None, help="URL of the Hugging Face hub (default: the public one)")
    credentials_file: Path | None = setting(
        None, help="credentials of private sources: NAME TOKEN, NAME USER PASSWORD or NAME ACCESS_KEY SECRET_KEY lines"
    )
    trusted_signers: Path | None = setting(
        None,
        help="what is asked of adapters' signatures, and who is trusted, TOML; see docs/signatures.md",
        metavar="FILE",
    )
    quotas_file: Path | None = setting(None, help="limits of tenants, TOML; see docs/quotas.md", metavar="FILE")
    max_connection_age_s: float = setting(
        1800.0, help="time after which a connection takes no further calls, so that clients dial anew; 0 for never"
    )
    enable_reflection: bool = setting(False, help="serve gRPC reflection")
    gc_grace_s: float = setting(60.0, help="seconds that a revision without a name is kept, for requests under way")
    gc_interval_s: float = setting(5.0, help="seconds between looks for such revisions")
    drain_settle_s: float = setting(0.0, help="seconds between NOT_SERVING and refusing new calls at shutdown")
    drain_grace_s: float = setting(5.0, help="seconds that running calls get at shutdown")
    log_level: str = setting("info", help="debug, info, warning or error")
    log_format: LogFormat = setting("console", help="log lines for people or for collectors")

    @property
    def num_replicas(self) -> int:
        """Replicas that must have a change on disk: one that the Sentinels may put in the primary's place."""
        if self.redis_replicas is not None:
            return self.redis_replicas
        return 0 if SentinelUrl.parse(self.redis_url) is None else 1

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("at least one --model is needed")
        self.check_identity(self.redis_url)
        require_identity(self.host, self.api_keys_file, allow_anonymous=self.allow_anonymous)
        for name in _POSITIVE:
            if not getattr(self, name) > 0:  # nor nan
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        for name in ("max_connection_age_s", "prepare_images", "redis_replicas"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        for root in self.import_root:
            if not root.is_dir():
                raise ValueError(f"--import-root {root} is no directory")
