"""The start and the end of a service process, as its operator sees them."""

from __future__ import annotations

import asyncio
import os
import signal
import threading


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets; a second signal ends the process the default way."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def request_stop() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, request_stop)
    return stop


def announce_ready(service: str, *, grpc: str, metrics: str, http: str | None = None) -> None:
    """Print the one line on stdout that says where a service listens; addresses are ``host:port``."""
    suffix = f" http={http}" if http is not None else ""
    print(f"ready: service={service} grpc={grpc} metrics={metrics}{suffix}", flush=True)


def end_after(seconds: float, status: int) -> None:
    """End the process then with a status, whatever its threads hold, unless it has ended in order before."""
    last_resort = threading.Timer(seconds, os._exit, [status])
    last_resort.daemon = True
    last_resort.start()
