"""Runs the gateway: ``python -m loraplex_gateway --model DIR --redis-url URL``."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from loraplex_common import log, settings
from loraplex_common.base_model import BaseModelError
from loraplex_common.descriptors import raise_limit
from loraplex_common.heap import keep_heap_small
from loraplex_common.keys_file import KeysFileError
from loraplex_common.lifecycle import announce_ready, stop_on_signals
from loraplex_common.ports import require_free
from loraplex_common.quotas_file import QuotasFileError

from loraplex_gateway.app import GatewayApp
from loraplex_gateway.config import GatewayConfig
from loraplex_gateway.resume.keys import ResumeKeyError
from loraplex_gateway.text.chat_template import ChatTemplateError

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def serve(config: GatewayConfig) -> None:
    """Run one gateway until SIGTERM or SIGINT, then drain it."""
    stop = stop_on_signals()
    app = GatewayApp(config)
    try:
        await app.start()
        ports = {"grpc": app.grpc_port, "http": app.http_port, "metrics": app.metrics_port}
        announce_ready("gateway", **{kind: f"{config.host}:{port}" for kind, port in ports.items()})
        await app.run_until(stop)
        await app.drain()
    finally:
        await app.close()


def run(main: Coroutine[None, None, None]) -> None:
    """Run a coroutine to its end, on uvloop where there is a wheel of it: it takes a third of an event's cost away."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


def main() -> None:
    """Read the configuration and serve."""
    config = settings.load(GatewayConfig, service="gateway")
    log.configure("gateway", config.log_level, config.log_format)
    raise_limit()
    keep_heap_small()
    log.get_logger().info("starting", **settings.describe(config))
    try:
        ports = {"--port": config.port, "--http-port": config.http_port, "--metrics-port": config.metrics_port}
        require_free(config.host, ports)
        run(serve(config))
    except (BaseModelError, ChatTemplateError, KeysFileError, QuotasFileError, ResumeKeyError, OSError) as error:
        sys.exit(f"loraplex-gateway: {error}")


if __name__ == "__main__":
    main()
