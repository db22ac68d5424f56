"""``python -m loraplex_engine``: serve one base model until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex_common import descriptors, lifecycle, log, settings, tracing
from loraplex_common.base_model import BaseModelError
from loraplex_common.errors import EngineHungError
from loraplex_common.hub_base import local_base
from loraplex_common.keys_file import KeysFileError
from loraplex_common.ports import require_free
from loraplex_common.tracing import TracingError

from loraplex_engine.config import ConfigError, EngineConfig
from loraplex_engine.ranks.plan_ring import GroupLostError

if TYPE_CHECKING:
    from collections.abc import Sequence


def prepare_process(config: EngineConfig) -> None:
    """Set what holds for the whole process: no other module of the engine does."""
    # Weights on a CPU in huge pages where the kernel lets programs ask: a decode step reads all of them, and misses in
    # the TLB cost up to a tenth of it. Torch reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch  # takes seconds; --help should not

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif config.tensor_parallel > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.tensor_parallel))


async def serve(config: EngineConfig) -> None:
    """Run an engine until a signal, then drain it."""
    prepare_process(config)
    from loraplex_engine.service import EXIT_HUNG, EngineService  # imports torch

    tracing.configure("engine", config.otlp_endpoint, config.trace_sample_ratio)
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
        tracing.shut_down()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the configuration and serve."""
    config = settings.load(EngineConfig, service="engine", argv=argv)
    log.configure("engine", config.log_level, config.log_format)
    descriptors.raise_limit()
    log.get_logger().info("configuration", **settings.describe(config))
    try:
        require_free(config.host, {"--port": config.port, "--metrics-port": config.metrics_port})
        directory, hub_name = local_base(config.model)
        name = config.served_model_name or hub_name
        asyncio.run(serve(replace(config, model=directory, served_model_name=name)))
    except (BaseModelError, ConfigError, KeysFileError, TracingError, OSError, GroupLostError) as error:
        sys.exit(f"loraplex-engine: {error}")


if __name__ == "__main__":
    main()
