"""The store's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex_common.log import LogFormat
from loraplex_common.secret import Secret
from loraplex_common.service_settings import ServiceSettings, require_identity, valkey_url
from loraplex_common.settings import secret, setting, size

MIB: Final = 1024 * 1024
_POSITIVE: Final = (
    "image_cache_bytes",
    "image_work_bytes",
    "disk_cache_bytes",
    "max_adapter_bytes",
    "max_concurrent_imports",
    "max_pending_imports",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig(ServiceSettings):
    """Keeps adapters and feeds engines."""

    model: tuple[Path, ...] = setting(help="base model directory in Hugging Face layout; repeat for several")
    served_model_name: str | None = setting(None, help="name of the first base model (default: its directory's)")
    model_alias: tuple[str, ...] = setting((), help="further name of the first base model, e.g. its hub id; repeatable")
    redis_url: str = valkey_url(help="Valkey or Redis, e.g. redis://127.0.0.1:6379/0 or unix:///path")
    import_root: tuple[Path, ...] = setting((), help="directory below which file: imports are allowed; repeatable")
    image_cache_bytes: int = size(1024 * MIB, help="host memory for page images")
    image_work_bytes: int = size(1024 * MIB, help="host memory for page images and adapters while images are made")
    disk_cache_dir: Path | None = setting(None, help="directory for images and adapters, so that a restart is warm")
    disk_cache_bytes: int = size(64 * 1024 * MIB, help="bytes of files in --disk-cache-dir")
    prepare_images: int = setting(
        32, help="new adapters that may wait until their images are made for the attached engines; 0 makes none ahead"
    )
    max_adapter_bytes: int = size(2048 * MIB, help="largest adapter_model.safetensors accepted")
    max_concurrent_imports: int = setting(2, help="imports at work at once")
    max_pending_imports: int = setting(64, help="imports waiting for their turn")
    host: str = setting("127.0.0.1", help="address to listen on")
    port: int = setting(8510, help="gRPC port; 0 picks a free one")
    metrics_port: int = setting(8511, help="HTTP port of /metrics and /healthz; 0 picks a free one")
    metrics_key: Secret | None = secret(help="the key that lets a scraper see restricted adapters")
    allow_anonymous: bool = setting(False, help="listen on a network without --api-keys-file")
    hf_endpoint: str | None = setting(None, help="URL of the Hugging Face hub (default: the public one)")
    credentials_file: Path | None = setting(None, help="file of NAME TOKEN lines for private hub repositories")
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

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("at least one --model is needed")
        self.check_identity(self.redis_url)
        require_identity(self.host, self.api_keys_file, allow_anonymous=self.allow_anonymous)
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        for name in ("max_connection_age_s", "prepare_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        for root in self.import_root:
            if not root.is_dir():
                raise ValueError(f"--import-root {root} is no directory")
