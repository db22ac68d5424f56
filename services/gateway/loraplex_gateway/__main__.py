"""Runs the gateway: ``python -m loraplex_gateway --model DIR --redis-url URL``."""

from __future__ import annotations

import asyncio
import sys

from loraplex_common import log, settings
from loraplex_common.base_model import BaseModelError
from loraplex_common.descriptors import raise_limit
from loraplex_common.keys_file import KeysFileError
from loraplex_common.lifecycle import announce_ready, stop_on_signals
from loraplex_common.ports import require_free
from loraplex_common.quotas_file import QuotasFileError

from loraplex_gateway.app import GatewayApp
from loraplex_gateway.chat_template import ChatTemplateError
from loraplex_gateway.config import GatewayConfig


async def serve(config: GatewayConfig) -> None:
    """Run one gateway until SIGTERM or SIGINT, then drain it."""
    stop = stop_on_signals()
    app = GatewayApp(config)
    try:
        await app.start()
        http = f"{config.host}:{app.http_port}"
        announce_ready("gateway", grpc=f"{config.host}:{app.grpc_port}", metrics=http, http=http)
        await app.run_until(stop)
        await app.drain()
    finally:
        await app.close()


def main() -> None:
    """Read the configuration and serve."""
    config = settings.load(GatewayConfig, service="gateway")
    log.configure("gateway", config.log_level, config.log_format)
    raise_limit()
    log.get_logger().info("starting", **settings.describe(config))
    try:
        require_free(config.host, {"--port": config.port, "--http-port": config.http_port})
        asyncio.run(serve(config))
    except (BaseModelError, ChatTemplateError, KeysFileError, QuotasFileError, OSError) as error:
        sys.exit(f"loraplex-gateway: {error}")


if __name__ == "__main__":
    main()
