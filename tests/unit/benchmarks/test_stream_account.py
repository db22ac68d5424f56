"""What a gateway adds to a latency is what clients see with it, less what they see without it at the same pace."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from loraplex_bench.streams.account import Window, add_latency_added, medians, rung, summary
from loraplex_bench.streams.direct import DirectServer, serve_sse
from loraplex_bench.streams.shared_number import SharedNumber
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path


def run(p50_ms: dict[float, float]) -> dict[str, Any]:
    """Return a run's summary: 100 streams at each pace, all events that long after they were sent."""
    rungs = []
    for pace, latency_ms in p50_ms.items():
        sent = {"a": [round(1e6 * n / pace) for n in range(int(pace))]}
        came = {"a": [(at + round(1e3 * latency_ms), 1) for at in sent["a"]]}
        rungs.append(rung(Window(pace, 0.0, 1.0, 0.1), sent, came))
    return summary(rungs)


def test_a_latency_without_a_gateway_is_no_gateways() -> None:
    direct, through = run({1000: 1.0, 2000: 2.0, 4000: 3.0}), run({1000: 1.5, 2000: 3.25, 4000: 9.0})

    add_latency_added(through, direct)

    assert through["half_load_p50_ms"] == 3.25
    assert through["half_load_direct_p50_ms"] == 2.0
    assert through["half_load_added_p50_ms"] == 1.25


def test_nothing_is_said_of_a_pace_at_which_nothing_was_measured_without_a_gateway() -> None:
    through = run({1000: 1.5, 2000: 3.25, 4000: 9.0})

    add_latency_added(through, run({1000: 1.0}))

    assert "half_load_added_p50_ms" not in through
    assert medians([through, through])["half_load_p50_ms"] == 3.25


async def read_events(folder: Path, count: int) -> bytes:
    """Return the first bytes of a stream of a server at 200 steps a second; its log is in the folder afterwards."""
    pace = SharedNumber(folder / "pace")
    pace.set(200.0)
    direct = DirectServer(pace, folder / "direct.log")
    server = await serve_sse(direct)
    stepping = asyncio.create_task(direct.run())
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    body = b'{"request_id": "mine"}'
    writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    received = b""
    while received.count(b"data: ") < count:
        received += await reader.readline()
    writer.close()
    await eventually((folder / "direct.log").exists, what="the end of the stream written down")
    stepping.cancel()
    server.close()
    return received


def test_the_server_without_a_gateway_gives_each_stream_an_event_a_step_and_says_when(tmp_path: Path) -> None:
    received = asyncio.run(read_events(tmp_path, 5))

    name, times = json.loads((tmp_path / "direct.log").read_text())
    events = [json.loads(line[6:]) for line in received.decode().splitlines() if line.startswith("data: ")]
    assert name == "mine"
    assert len(times) >= len(events) == 5
    assert {event["choices"][0]["text"] for event in events} == {"A"}
    assert times == sorted(times)
