"""A gateway of several processes is one gateway: one pair of ports, one /metrics, one end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common import valkey
from loraplex_common.base_model import load_base_model
from prometheus_client.parser import text_string_to_metric_families
from support.engine_double import EngineDouble
from support.gateway_rig import MODEL_NAME, letters, model_directory, text_request
from support.processes import ServiceProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration
FREE_PORTS = ("--port", "0", "--http-port", "0", "--metrics-port", "0")
NUM_WORKERS = 2
PROCESSES = Path("/proc")
BODY = {"model": MODEL_NAME, "prompt": "the quick", "max_tokens": 4}


class Workers:
    """A gateway with two workers over an engine double."""

    def __init__(self, process: ServiceProcess, engine: EngineDouble) -> None:
        self.process = process
        self.engine = engine

    def pids(self) -> list[int]:
        """Return the workers' processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[gateway_pb2_grpc.GatewayServiceAsyncStub]:
        """Connect anew: to any of the workers."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(self.process.addresses["grpc"], options=options) as channel:
            yield gateway_pb2_grpc.GatewayServiceStub(channel)

    async def complete(self) -> int:
        """Return the status of a completion on a connection of its own."""
        async with httpx.AsyncClient(timeout=30) as client:
            response = await client.post(f"http://{self.process.addresses['http']}/v1/completions", json=BODY)
        return response.status_code

    async def health(self) -> int:
        """Return the status of the health check of the parent."""
        async with httpx.AsyncClient(timeout=30) as client:
            return (await client.get(f"http://{self.process.addresses['metrics']}/healthz")).status_code

    async def metric(self, name: str, **labels: str) -> list[float]:
        """Return the values of a metric's samples with these labels."""
        async with httpx.AsyncClient(timeout=30) as client:
            page = await client.get(f"http://{self.process.addresses['metrics']}/metrics")
        samples = [sample for family in text_string_to_metric_families(page.text) for sample in family.samples]
        return [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]


@pytest.fixture
async def workers(valkey_url: str, tmp_path: Path) -> AsyncIterator[Workers]:
    base = load_base_model(model_directory())
    engine, client = EngineDouble(base=base, reply=letters), valkey.connect(valkey_url)
    await engine.start()
    await engine.register(client)
    arguments = ["--model", str(model_directory()), "--redis-url", valkey_url, "--drain-settle-s", "0"]
    process = ServiceProcess("loraplex_gateway", [*arguments, *FREE_PORTS, "--workers", "2"], log_dir=tmp_path)
    try:
        await asyncio.to_thread(process.wait_ready)
        await engine.wait_for(lambda: engine.num_sessions >= NUM_WORKERS, 30)
        yield Workers(process, engine)
    finally:
        await asyncio.to_thread(process.stop)
        await engine.unregister(client)
        await engine.kill()
        await client.aclose()


async def first_chunk(call: Any) -> None:
    """Return once a stream has given text."""
    while (await call.read()).WhichOneof("event") != "chunk":
        pass


async def last_event(call: Any) -> gateway_pb2.GenerateResponse:
    """Read a stream to its end."""
    last = gateway_pb2.GenerateResponse()
    while (event := await call.read()) is not grpc.aio.EOF:
        last = event
    return last


def is_gone(pid: int) -> bool:
    """Return whether a process has ended."""
    return not (PROCESSES / str(pid)).exists()


def refused(*arguments: str) -> str:
    """Return what a gateway says that does not start."""
    command = [sys.executable, "-m", "loraplex_gateway", "--model", str(model_directory())]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 1
    return result.stderr


async def test_both_workers_serve_both_faces_and_metrics_sum_them(workers: Workers) -> None:
    assert len(workers.pids()) == NUM_WORKERS
    assert [await workers.complete() for _ in range(12)] == [200] * 12
    for _ in range(12):
        async with workers.stub() as stub:
            await stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()))

    assert await workers.metric("loraplex_gateway_requests_total", code="OK") == [24.0]
    assert await workers.metric("loraplex_gateway_ttft_seconds_count") == [24.0]
    for of_all_engines in ("vllm:num_requests_running", "vllm:lora_requests_info"):
        assert len(await workers.metric(of_all_engines)) == 1


async def test_any_worker_tells_the_load_of_all(workers: Workers) -> None:
    workers.engine.hold_at = 2
    url = f"http://{workers.process.addresses['http']}/load"
    async with AsyncExitStack() as stack:
        calls: list[Any] = []
        for n in range(8):  # the chance that one worker has all of them is 1 in 128
            stub = await stack.enter_async_context(workers.stub())
            calls.append(stub.Generate(text_request(request_id=f"r{n}")))
            await first_chunk(calls[-1])
        loads = []
        for _ in range(8):
            async with httpx.AsyncClient(timeout=30) as client:
                loads.append((await client.get(url)).json())
        workers.engine.release()
        for call in calls:
            await last_event(call)

    assert loads == [{"server_load": 8}] * 8


async def test_a_request_is_cancelled_through_any_worker(workers: Workers) -> None:
    workers.engine.hold_at = 2
    async with workers.stub() as stub:
        for n in range(6):  # the chance that all of these cancellations reach the stream's own worker is 1 in 64
            call: Any = stub.Generate(text_request(request_id=f"r{n}"))
            await first_chunk(call)
            async with workers.stub() as other:
                ended = await other.CancelRequest(gateway_pb2.CancelRequestRequest(request_id=f"r{n}"))

            assert ended.was_running
            assert (await last_event(call)).finished.finish_reason == gateway_pb2.FINISH_REASON_CANCELLED


async def test_a_worker_that_dies_is_replaced_and_its_counts_stay_and_one_that_hangs_is_told(workers: Workers) -> None:
    assert [await workers.complete() for _ in range(6)] == [200] * 6
    assert await workers.metric("loraplex_gateway_requests_total", code="OK") == [6.0]
    victim, other = workers.pids()

    os.kill(victim, signal.SIGKILL)
    await workers.engine.wait_for(lambda: workers.engine.num_sessions >= NUM_WORKERS + 1, 60)

    os.kill(other, signal.SIGSTOP)
    assert await workers.health() == 503
    os.kill(other, signal.SIGCONT)
    assert await workers.health() == 200
    assert other in workers.pids()
    assert len(workers.pids()) == NUM_WORKERS
    assert await workers.metric("loraplex_gateway_requests_total", code="OK") == [6.0]
    assert [await workers.complete() for _ in range(6)] == [200] * 6


async def test_a_second_gateway_on_the_ports_is_refused(workers: Workers) -> None:
    port, http_port = (workers.process.addresses[kind].rpartition(":")[2] for kind in ("grpc", "http"))
    rest = ("--redis-url", "redis://127.0.0.1:1", "--metrics-port", "0")

    for number in ("1", "2"):
        said = await asyncio.to_thread(refused, "--port", port, "--http-port", "0", *rest, "--workers", number)
        assert f"port {port} of 127.0.0.1 is taken" in said
        said = await asyncio.to_thread(refused, "--port", "0", "--http-port", http_port, *rest, "--workers", number)
        assert f"port {http_port} of 127.0.0.1 is taken" in said


async def test_all_workers_drain_when_the_parent_is_told_to_end(workers: Workers) -> None:
    workers.engine.hold_at = 2
    async with workers.stub() as first, workers.stub() as second:
        calls: list[Any] = [stub.Generate(text_request()) for stub in (first, second)]
        for call in calls:
            await first_chunk(call)
        pids = workers.pids()
        os.kill(workers.process.pid, signal.SIGTERM)
        workers.engine.release()
        ends = [await last_event(call) for call in calls]

    assert all(end.WhichOneof("event") == "finished" for end in ends)
    assert await asyncio.to_thread(workers.process.wait) == 0
    assert all(map(is_gone, pids))
