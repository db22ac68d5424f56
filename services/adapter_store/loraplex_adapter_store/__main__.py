"""``python -m loraplex_adapter_store``."""

from __future__ import annotations

import asyncio
import gc
import sys
from dataclasses import replace
from typing import Final

from loraplex_common import tracing
from loraplex_common.base_model import BaseModelError
from loraplex_common.descriptors import raise_limit
from loraplex_common.heap import keep_heap_small
from loraplex_common.hub_base import local_bases
from loraplex_common.keys_file import KeysFileError
from loraplex_common.lifecycle import announce_ready, stop_on_signals
from loraplex_common.log import configure, get_logger
from loraplex_common.ports import require_free
from loraplex_common.quotas_file import QuotasFileError
from loraplex_common.settings import describe, load

from loraplex_adapter_store.config import StoreConfig
from loraplex_adapter_store.credentials import CredentialsFileError
from loraplex_adapter_store.disk.disk_index import DirectoryInUseError
from loraplex_adapter_store.repository.hot_tier import ColdTierError
from loraplex_adapter_store.service import running_store
from loraplex_adapter_store.signatures.trust import TrustFileError


async def run(config: StoreConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    tracing.configure("adapter_store", config.otlp_endpoint, config.trace_sample_ratio)
    stop = stop_on_signals()
    async with running_store(config) as store:
        announce_ready(
            "adapter_store", grpc=f"{config.host}:{store.grpc_port}", metrics=f"{config.host}:{store.metrics_port}"
        )
        await store.supervisor.run_until(stop)
    tracing.shut_down()
    store.check_integrity()


_NAMED: Final = (
    BaseModelError,
    KeysFileError,
    CredentialsFileError,
    QuotasFileError,
    ColdTierError,
    DirectoryInUseError,
    TrustFileError,
    tracing.TracingError,
)
"""What is wrong with flags or files, in a message for the operator."""


def main() -> None:
    """Read the configuration and run the service; exits 2 if it cannot start with it."""
    config = load(StoreConfig, service="adapter_store")
    configure("adapter_store", level=config.log_level, fmt=config.log_format)
    raise_limit()
    keep_heap_small()
    get_logger().info("configuration", **describe(config))
    try:
        require_free(config.host, {"--port": config.port, "--metrics-port": config.metrics_port})
        directories, hub_name = local_bases(config.model)
        name = config.served_model_name or hub_name
        gc.freeze()  # all that has been imported stays; a full collection that looks at it stops calls for 50 ms
        asyncio.run(run(replace(config, model=directories, served_model_name=name)))
    except (*_NAMED, OSError) as error:
        print(f"loraplex-adapter-store: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
