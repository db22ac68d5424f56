"""Runs a gateway in this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from loraplex_common import tracing
from loraplex_common.base_model import BaseModelError
from loraplex_common.keys_file import KeysFileError
from loraplex_common.lifecycle import announce_ready, stop_on_signals
from loraplex_common.quotas_file import QuotasFileError
from loraplex_common.tracing import TracingError

from loraplex_gateway.app import GatewayApp
from loraplex_gateway.resume.keys import ResumeKeyError
from loraplex_gateway.text.chat_template import ChatTemplateError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from loraplex_gateway.config import GatewayConfig
    from loraplex_gateway.workers.setup import WorkerSetup

STARTING_ERRORS: Final = (
    BaseModelError,
    ChatTemplateError,
    KeysFileError,
    QuotasFileError,
    ResumeKeyError,
    TracingError,
    OSError,
)
"""What an operator can mend: told in one line."""


async def serve(config: GatewayConfig, setup: WorkerSetup | None = None) -> None:
    """Run one gateway process until SIGTERM or SIGINT, then drain it; `setup` is a worker's."""
    tracing.configure("gateway", config.otlp_endpoint, config.trace_sample_ratio)
    stop = stop_on_signals()
    app = GatewayApp(config, setup)
    try:
        await app.start()
        ports = {"grpc": app.grpc_port, "http": app.http_port, "metrics": app.metrics_port}
        announce_ready("gateway", **{kind: f"{config.host}:{port}" for kind, port in ports.items()})
        await app.run_until(stop)
        await app.drain()
    finally:
        await app.close()
        tracing.shut_down()


def run(main: Coroutine[None, None, None]) -> None:
    """Run a coroutine to its end, on uvloop where there is a wheel of it: it takes a third of an event's cost away."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)
