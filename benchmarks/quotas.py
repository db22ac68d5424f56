"""What quotas cost a gateway: one with limits on everything beside one without, the same requests in turns.

Usage: ``python benchmarks/quotas.py [--rounds 7] [--requests 400] [--concurrency 32] [--output FILE]``

Each gateway is a process of its own and has its own engine double, which answers at once; both share one real Valkey.
Throughput is of bursts over gRPC; the first token's time is of single requests, so that no queue is part of it. On a
machine whose cores others use, the processor time that a request takes of the gateway says more than the clock: its
ratio is that of the throughputs of a gateway with a core to itself. Prints a summary and writes a JSON file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.base_model import load_base_model
from loraplex_common.grpc_channel import open_channel
from loraplex_common.valkey import EmbeddedValkey, connect
from support.base_models import TinyBase, write_base_model
from support.engine_double import EngineDouble
from support.processes import ServiceProcess

if TYPE_CHECKING:
    from loraplex.v1 import engine_pb2

ROOT = Path(__file__).resolve().parent.parent

QUOTAS = """\
[default]
requests_per_minute = 1_000_000_000
tokens_per_minute = 1_000_000_000_000
max_concurrent_requests = 1_000_000
"""
OUTPUT_TOKENS = 16
TICKS = os.sysconf("SC_CLK_TCK")
LEAST_THROUGHPUT = 0.95
MOST_FIRST_TOKEN_MS = 1.0


@dataclass
class Side:
    """One gateway and what was measured of it."""

    name: str
    process: ServiceProcess
    stub: gateway_pb2_grpc.GatewayServiceAsyncStub
    requests_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)

    def cpu_s(self) -> float:
        """Return the processor time that the gateway has used."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / TICKS


def reply(submit: engine_pb2.Submit) -> list[int]:
    return [20 + n % 60 for n in range(submit.stopping.max_new_tokens)]


def request() -> gateway_pb2.GenerateRequest:
    stopping = gateway_pb2.StoppingParams(max_new_tokens=OUTPUT_TOKENS)
    return gateway_pb2.GenerateRequest(text="the quick brown fox", stopping=stopping)


async def burst(side: Side, num_requests: int, concurrency: int) -> None:
    left = iter(range(num_requests))

    async def work() -> None:
        for _ in left:
            async for _ in side.stub.Generate(request()):
                pass

    cpu_s, began = side.cpu_s(), time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    side.requests_per_s.append(num_requests / (time.perf_counter() - began))
    side.cpu_ms.append((side.cpu_s() - cpu_s) * 1000 / num_requests)


async def first_token(side: Side) -> None:
    began = time.perf_counter()
    stream = side.stub.Generate(request())
    async for event in stream:
        if event.HasField("chunk"):
            side.first_token_ms.append((time.perf_counter() - began) * 1000)
            break
    stream.cancel()


async def start(stack: AsyncExitStack, folder: Path, model: Path, url: str, name: str, *options: str) -> Side:
    """Start a gateway with an engine that no other gateway knows: databases of Valkey keep them apart."""
    engine = EngineDouble(base=load_base_model(model), reply=reply, tokens_per_message=4)
    await engine.start()
    stack.push_async_callback(engine.kill)
    client = connect(url)
    stack.push_async_callback(client.aclose)
    await engine.register(client)
    ports = ("--port", "0", "--http-port", "0", "--metrics-port", "0")
    arguments = ["--model", str(model), "--redis-url", url, *ports, "--log-level", "warning"]
    process = ServiceProcess("loraplex_gateway", [*arguments, *options], log_dir=folder)
    stack.callback(process.stop)
    await asyncio.to_thread(process.wait_ready)
    channel = await stack.enter_async_context(open_channel(process.grpc))
    return Side(name, process, gateway_pb2_grpc.GatewayServiceStub(channel))


async def measure(options: argparse.Namespace) -> dict[str, Side]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-bench-")))
        valkey = stack.enter_context(EmbeddedValkey(folder / "valkey"))
        model = write_base_model(folder / "tiny", TinyBase())
        (folder / "quotas.toml").write_text(QUOTAS)
        off = await start(stack, folder, model, f"{valkey.url}?db=0", "off")
        on = await start(stack, folder, model, f"{valkey.url}?db=1", "on", "--quotas-file", str(folder / "quotas.toml"))
        for side in (off, on):
            await burst(side, options.requests // 2, options.concurrency)
            side.requests_per_s.clear()
            side.cpu_ms.clear()
        for number in range(options.rounds):
            for side in (off, on) if number % 2 else (on, off):
                await burst(side, options.requests, options.concurrency)
            for _ in range(options.singles):
                for side in (off, on):
                    await first_token(side)
        return {"off": off, "on": on}


def summary(sides: dict[str, Side], options: argparse.Namespace) -> dict[str, Any]:
    off, on = sides["off"], sides["on"]
    ratios = [a / b for a, b in zip(on.requests_per_s, off.requests_per_s, strict=True)]
    return {
        "what": "requests/s, gateway's CPU per request and time of the first token, quotas on and off",
        "command": f"python benchmarks/quotas.py --rounds {options.rounds} --requests {options.requests} "
        f"--concurrency {options.concurrency}",
        "num_cpus": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "requests_per_s": {name: [round(x, 1) for x in side.requests_per_s] for name, side in sides.items()},
        "cpu_ms_per_request": {name: [round(x, 3) for x in side.cpu_ms] for name, side in sides.items()},
        "first_token_p50_ms": {name: round(statistics.median(s.first_token_ms), 3) for name, s in sides.items()},
        "throughput_on_over_off": round(statistics.median(ratios), 3),
        "cpu_off_over_on": round(statistics.median(off.cpu_ms) / statistics.median(on.cpu_ms), 3),
        "first_token_p50_added_ms": round(
            statistics.median(on.first_token_ms) - statistics.median(off.first_token_ms), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--singles", type=int, default=60, help="single requests per round")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = summary(asyncio.run(measure(options)), options)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    output = options.output or ROOT / "benchmarks" / "results" / f"quotas-{stamp}.json"
    output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    is_good = (
        found["throughput_on_over_off"] >= LEAST_THROUGHPUT and found["first_token_p50_added_ms"] <= MOST_FIRST_TOKEN_MS
    )
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
