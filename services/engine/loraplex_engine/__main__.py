"""``python -m loraplex_engine``: serve one base model until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

from loraplex_common import descriptors, lifecycle, log, settings
from loraplex_common.base_model import BaseModelError
from loraplex_common.errors import EngineHungError
from loraplex_common.keys_file import KeysFileError
from loraplex_common.ports import require_free

from loraplex_engine.config import ConfigError, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


async def serve(config: EngineConfig) -> None:
    """Run an engine until a signal, then drain it."""
    # On a CPU, weights lie in huge pages where the kernel allows it: a decode step reads all of them, and TLB misses
    # cost up to a tenth of its time. Torch reads this setting at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from loraplex_engine.service import EXIT_HUNG, EngineService  # torch takes seconds; --help should not

    stop = lifecycle.stop_on_signals()
    service = EngineService(config)
    try:
        port, metrics_port = await service.start()
        host = config.host
        lifecycle.announce_ready("engine", grpc=f"{host}:{port}", metrics=f"{host}:{metrics_port}")
        await service.run_until(stop)
        await service.drain()
    except EngineHungError:
        await service.close()
        os._exit(EXIT_HUNG)  # a thread that hangs would keep the interpreter from its end
    finally:
        await service.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the configuration and serve."""
    config = settings.load(EngineConfig, service="engine", argv=argv)
    log.configure("engine", config.log_level, config.log_format)
    descriptors.raise_limit()
    log.get_logger().info("configuration", **settings.describe(config))
    try:
        require_free(config.host, {"--port": config.port, "--metrics-port": config.metrics_port})
        asyncio.run(serve(config))
    except (BaseModelError, ConfigError, KeysFileError, OSError) as error:
        sys.exit(f"loraplex-engine: {error}")


if __name__ == "__main__":
    main()
