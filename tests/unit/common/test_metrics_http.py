"""GET /metrics and /healthz beside the event loop."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common import metrics_http
from loraplex_common.exposition import Audience, Exposition, private
from loraplex_common.metrics_http import MetricsServer
from loraplex_common.secret import Secret
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from email.message import Message


def get(port: int, path: str, **headers: str) -> tuple[int, str, Message]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def port(registry: CollectorRegistry) -> AsyncIterator[int]:
    server = MetricsServer(Exposition(registry))
    yield await server.start()
    await server.stop()
    await server.stop()


async def test_metrics_are_served_in_the_format_asked_for(registry: CollectorRegistry, port: int) -> None:
    Gauge("loraplex_engine_leases", "Leases.", registry=registry).set(3)

    status, text, headers = await asyncio.to_thread(get, port, "/metrics?x=1")
    _, open_text, open_headers = await asyncio.to_thread(
        get, port, "/metrics", Accept="application/openmetrics-text; version=1.0.0"
    )

    assert (status, headers["Content-Type"].partition(";")[0]) == (200, "text/plain")
    assert "loraplex_engine_leases 3.0" in text
    assert open_headers["Content-Type"].startswith("application/openmetrics-text")
    assert open_text.endswith("# EOF\n")


async def test_private_values_are_for_those_with_the_key_and_a_wrong_key_is_refused(
    registry: CollectorRegistry,
) -> None:
    Counter("calls", "Calls.", ["tenant"], registry=registry).labels(private("acme")).inc()
    server = MetricsServer(Exposition(registry, audience=Audience(Secret("key"))))
    port = await server.start()

    answers = [
        await asyncio.to_thread(get, port, "/metrics", **headers)
        for headers in ({}, {"Authorization": "Bearer key"}, {"Authorization": "Bearer guess"})
    ]

    assert [status for status, _, _ in answers] == [200, 200, 401]
    assert ["acme" in text for _, text, _ in answers] == [False, True, False]
    assert answers[2][2]["WWW-Authenticate"] == "Bearer"
    await server.stop()


async def test_health_is_ok_and_other_paths_are_not_found(port: int) -> None:
    assert (await asyncio.to_thread(get, port, "/healthz"))[:2] == (200, "ok\n")
    assert (await asyncio.to_thread(get, port, "/"))[0] == 404


async def test_collectors_run_on_the_event_loops_thread(registry: CollectorRegistry, port: int) -> None:
    class Where:
        def collect(self) -> Iterator[Any]:
            yield GaugeMetricFamily("thread_id", "Thread.", value=threading.get_ident())

    registry.register(Where())

    text = (await asyncio.to_thread(get, port, "/metrics"))[1]

    (line,) = [line for line in text.splitlines() if line.startswith("thread_id ")]
    assert float(line.split()[1]) == float(threading.get_ident())


async def test_a_loop_that_hangs_fails_its_health_check(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "RENDER_TIMEOUT_S", 0.1)
    answers: list[int] = []
    prober = threading.Thread(target=lambda: answers.append(get(port, "/healthz")[0]))
    prober.start()

    prober.join()  # blocks the loop on purpose

    assert answers == [503]


async def test_a_taken_port_is_refused(port: int, registry: CollectorRegistry) -> None:
    with pytest.raises(OSError, match="in use"):
        await MetricsServer(Exposition(registry), port=port).start()


async def test_connections_that_only_wait_keep_no_scraper_out(
    monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry
) -> None:
    monkeypatch.setattr(metrics_http, "MAX_CONNECTIONS", 4)
    server = MetricsServer(Exposition(registry))
    port = await server.start()
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]

    status, _, _ = await asyncio.to_thread(get, port, "/healthz")

    assert status == 200
    async with asyncio.timeout(5):
        assert await idle[0][0].read() == b""  # long before its own 10 s
    for _, writer in idle:
        writer.close()
    await server.stop()
