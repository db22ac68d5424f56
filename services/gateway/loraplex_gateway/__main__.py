"""Runs the gateway: ``python -m loraplex_gateway --model DIR --redis-url URL``."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

from loraplex_common import log, settings
from loraplex_common.descriptors import raise_limit
from loraplex_common.heap import keep_heap_small
from loraplex_common.hub_base import local_bases
from loraplex_common.ports import require_free

from loraplex_gateway.config import GatewayConfig
from loraplex_gateway.process import STARTING_ERRORS, run, serve
from loraplex_gateway.workers.parent import Parent


def main() -> None:
    """Read the configuration and serve, in this process or in those that it keeps."""
    config = settings.load(GatewayConfig, service="gateway")
    log.configure("gateway", config.log_level, config.log_format)
    raise_limit()
    keep_heap_small()
    log.get_logger().info("starting", **settings.describe(config))
    try:
        ports = {"--port": config.port, "--http-port": config.http_port, "--metrics-port": config.metrics_port}
        require_free(config.host, ports)
        directories, hub_name = local_bases(config.model)
        config = replace(config, model=directories, served_model_name=config.served_model_name or hub_name)
        if config.workers > 1:
            asyncio.run(Parent(config, sys.argv[1:]).serve())
        else:
            run(serve(config))
    except STARTING_ERRORS as error:
        sys.exit(f"loraplex-gateway: {error}")


if __name__ == "__main__":
    main()
