"""What usage ledger, traces and metrics cost a gateway: CPU time of its process for each request, on and off in one run.

Usage: ``python benchmarks/gateway_observed.py [--before DIR] [--face grpc|sse] [--concurrent 32] [--rounds 40] [--requests 200]
[--tokens 64] [--out FILE]``

Gateways of this tree serve the same streams from the same engine double, in turns: ``off`` counts no metrics, keeps no usage
records and traces nothing; ``metrics`` counts and is scraped every five seconds; ``ledger`` keeps records, too; ``on`` also
traces every request to a collector. ``--before``, a tree with ``services`` and ``proto/gen`` of another commit, adds a gateway
of that. CPU time is what bounds a gateway's throughput, and tells more on a busy machine than the time that passes: short turns
make the machine's moods the same for all of a round. Told: CPU per request of each, the median over the rounds, and what each
adds to ``off`` in the same round: the median, and the interval that holds it in 95 of 100 resamplings of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_bench.streams.parts import Gateway

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

OTLP = "LORAPLEX_GATEWAY_OTLP_ENDPOINT"
USAGE_RECORDS = "LORAPLEX_GATEWAY_USAGE_RECORDS"
# Spans are sent in the turn that they belong to: smaller batches than by default, which cost more rather than less.
EXPORT_DELAY = {"OTEL_BSP_SCHEDULE_DELAY": "400"}
SETTLE_S = 1.0  # records and spans gather for less
LEASE_S = 1.0  # how often the engine double's lease is renewed, by us
RESAMPLINGS = 10_000
UNCOUNTED = "loraplex_bench.uncounted_gateway"
SCRAPE_INTERVAL_S = 5.0  # as deploy/prometheus/prometheus.yml has it


async def load(gateway: Gateway, arguments: argparse.Namespace, num_requests: int) -> None:
    """Read so many streams, some at a time."""
    room = asyncio.Semaphore(arguments.concurrent)
    async with AsyncExitStack() as stack:
        one = await (sse if arguments.face == "sse" else grpc)(gateway, arguments.tokens, stack)

        async def in_turn() -> None:
            async with room:
                await one()

        await asyncio.gather(*(in_turn() for _ in range(num_requests)))


async def grpc(gateway: Gateway, num_tokens: int, stack: AsyncExitStack) -> Callable[[], Awaitable[None]]:
    """Return what reads a stream over gRPC."""
    from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
    from loraplex_common.grpc_channel import open_channel
    from support.gateway_rig import text_request

    channel = await stack.enter_async_context(open_channel(gateway.addresses["grpc"]))
    stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)

    async def one() -> None:
        stopping = gateway_pb2.StoppingParams(max_new_tokens=num_tokens, ignore_eos=True)
        async for _ in stub.Generate(text_request(stopping=stopping), timeout=60):
            pass

    return one


async def sse(gateway: Gateway, num_tokens: int, _: AsyncExitStack) -> Callable[[], Awaitable[None]]:
    """Return what reads a stream of server-sent events, over a connection of its own."""
    host, _port, port = gateway.addresses["http"].rpartition(":")
    told = {
        "model": "tiny",
        "prompt": "The quick brown fox",
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    body = json.dumps(told).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head + body)
        answer = await reader.read()
        writer.close()
        if answer.count(b"data: ") <= num_tokens // 2:  # several tokens may share an event, not all of them
            raise SystemExit(f"a stream ended early: {answer[-500:]!r}")

    return one


async def measure(
    arguments: argparse.Namespace, folder: Path, stack: ExitStack
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the gateways' CPU time for a request, in ms, of each round, and what each part takes by itself, in us."""
    from loraplex_common import valkey
    from loraplex_common.base_model import load_base_model
    from loraplex_common.valkey import EmbeddedValkey
    from support.base_models import TinyBase, write_base_model
    from support.engine_double import EngineDouble
    from support.gateway_rig import letters
    from support.otlp_collector import running_collector

    server = stack.enter_context(EmbeddedValkey(folder / "valkey"))
    collector = stack.enter_context(running_collector())
    os.environ["LORAPLEX_GATEWAY_REDIS_URL"] = server.url
    model = write_base_model(folder / "tiny", TinyBase())
    engine = EngineDouble(base=load_base_model(model), reply=letters, resident=set(), max_model_len=512)
    await engine.start()
    client = valkey.connect(server.url)
    await engine.register(client)
    lease = asyncio.create_task(renew(lambda: engine.register(client)))
    gateways: dict[str, Gateway] = {}
    for name, settings in variants(arguments, collector.target).items():
        tree = arguments.before if name == "before" else None
        module = UNCOUNTED if name == "off" else "loraplex_gateway"
        with environment(settings):
            gateways[name] = await asyncio.to_thread(Gateway, str(model), tree=tree, workers=0, module=module)
        stack.callback(gateways[name].close)
    parts = await asyncio.to_thread(parts_us, collector.target, arguments.tokens)
    for gateway in gateways.values():
        await load(gateway, arguments, 100)  # warm
    found = await take_turns(arguments, gateways)
    await ended(lease)
    if not any(span.service == "loraplex-gateway" for span in collector.spans):
        raise SystemExit("no span came: tracing was not on")
    await engine.kill()
    await client.aclose()
    return found, parts


def parts_us(collector: str, num_tokens: int) -> dict[str, float]:
    """Return what each part takes for a request by itself, in us."""
    command = [sys.executable, "-m", "loraplex_bench.observed_parts", "--collector", collector]
    done = subprocess.run([*command, "--tokens", str(num_tokens)], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def variants(arguments: argparse.Namespace, collector: str) -> dict[str, dict[str, str]]:
    """Return the gateways' names and what each has set."""
    none = {USAGE_RECORDS: "0"}
    found = {"off": none, "metrics": none, "ledger": {}, "on": {OTLP: collector, **EXPORT_DELAY}}
    return found | ({"before": {OTLP: collector, **EXPORT_DELAY}} if arguments.before else {})


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Let child processes that start in the block have these variables, and none of another gateway's."""
    before = dict(os.environ)
    for variable in (OTLP, USAGE_RECORDS, *EXPORT_DELAY):
        os.environ.pop(variable, None)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def renew(register: Callable[[], Awaitable[None]]) -> None:
    """Renew the engine's lease, until cancelled."""
    while True:
        await register()
        await asyncio.sleep(LEASE_S)


async def scrape(address: str) -> None:
    """Read the metrics of a gateway as Prometheus does, until cancelled."""
    while True:
        await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read())
        await asyncio.sleep(SCRAPE_INTERVAL_S)


async def take_turns(arguments: argparse.Namespace, gateways: dict[str, Gateway]) -> dict[str, list[float]]:
    """Return the gateways' CPU time for a request, in ms, of each round."""
    found: dict[str, list[float]] = {name: [] for name in gateways}
    for number in range(arguments.rounds):
        names = list(gateways)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # each in each place of a round
            gateway = gateways[name]
            before_s = gateway.cpu_s()
            scraper = asyncio.create_task(scrape(gateway.addresses["metrics"])) if name != "off" else None
            await load(gateway, arguments, arguments.requests)
            await asyncio.sleep(SETTLE_S)
            if scraper is not None:
                await ended(scraper)
            found[name].append((gateway.cpu_s() - before_s) / arguments.requests * 1e3)
        print(" ".join(f"{name} {values[-1]:.3f}" for name, values in found.items()), "ms", flush=True)
    return found


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel a task; raise what it failed with."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def added_to_off(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return what each adds to `off` in the same round, as a part of it: median, low and high end of the 95 % interval."""
    chance = random.Random(1)
    added: dict[str, list[float]] = {}
    for name in [name for name in found if name != "off"]:
        ratios = [mine / bare - 1 for mine, bare in zip(found[name], found["off"], strict=True)]
        again = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLINGS))
        added[name] = [statistics.median(ratios), again[RESAMPLINGS // 40], again[-1 - RESAMPLINGS // 40]]
    return added


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="tree of a commit to compare with, too")
    parser.add_argument("--face", choices=("grpc", "sse"), default="grpc", help="what the clients speak")
    for name, default in (("--concurrent", 32), ("--rounds", 40), ("--requests", 200), ("--tokens", 64)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--out", type=Path, help="file of the results, JSON")
    parser.add_argument("--commit", default="", help="written into the results")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name, ExitStack() as stack:
        found, parts = asyncio.run(measure(arguments, Path(name), stack))
    medians = {name: statistics.median(values) for name, values in found.items()}
    added = added_to_off(found)
    for name, (middle, low, high) in added.items():
        print(f"{name:<9} {medians[name]:.3f} ms a request, {middle:+.1%} (95 % interval {low:+.1%} to {high:+.1%})")
    share = sum(parts.values()) / (medians["off"] * 1e3)
    print(" ".join(f"{name} {us:.1f}" for name, us in parts.items()), f"us a request by themselves: {share:.1%} of off")
    if arguments.out:
        report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": arguments.commit}
        report |= {"machine": f"CPU, {os.cpu_count()} cores", "python": sys.version.split()[0]}
        report |= {"command": " ".join(["python", "benchmarks/gateway_observed.py", *sys.argv[1:]])}
        report |= {"face": arguments.face, "concurrent": arguments.concurrent}
        report |= {"tokens": arguments.tokens, "cpu_ms_per_request": found, "medians": medians, "added": added}
        report |= {"parts_us": parts, "share": share}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
