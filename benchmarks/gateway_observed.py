"""What usage ledger, traces and scrapes cost a gateway: CPU time of its process for each request, on and off in one run.

Usage: ``python benchmarks/gateway_observed.py [--before DIR] [--rounds 12] [--requests 600] [--tokens 64] [--out FILE]``

Three gateways of this tree serve the same streams from the same engine double, in turns: ``off`` keeps no usage records, traces
nothing and is not scraped; ``ledger`` keeps records; ``on`` keeps records, traces every request to a collector and is scraped
every five seconds. Series are counted in all of them, as nothing switches that off; ``--before``, a tree with ``services`` and
``proto/gen`` of another commit, adds a gateway of that. CPU time is what bounds a gateway's throughput, and tells more on a busy
machine than the time that passes. Told: CPU per request of each, the median over the rounds, and what each adds to ``off`` in
the same round: the median, and the range of the middle half of the rounds.
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
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_bench.streams.parts import Gateway

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

CONCURRENT = 32
OTLP = "LORAPLEX_GATEWAY_OTLP_ENDPOINT"
USAGE_RECORDS = "LORAPLEX_GATEWAY_USAGE_RECORDS"
SCRAPE_INTERVAL_S = 5.0  # as deploy/prometheus/prometheus.yml has it


async def load(target: str, num_requests: int, num_tokens: int) -> None:
    """Read so many streams of so many tokens, some at a time."""
    from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
    from loraplex_common.grpc_channel import open_channel
    from support.gateway_rig import text_request

    room = asyncio.Semaphore(CONCURRENT)
    async with open_channel(target) as channel:
        stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)

        async def one() -> None:
            async with room:
                stopping = gateway_pb2.StoppingParams(max_new_tokens=num_tokens, ignore_eos=True)
                async for _ in stub.Generate(text_request(stopping=stopping), timeout=60):
                    pass

        await asyncio.gather(*(one() for _ in range(num_requests)))


async def measure(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, list[float]]:
    """Return the gateways' CPU time for a request, in ms, of each round."""
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
    gateways: dict[str, Gateway] = {}
    variants: dict[str, dict[str, str]] = {"off": {USAGE_RECORDS: "0"}, "ledger": {}, "on": {OTLP: collector.target}}
    if arguments.before:
        variants["before"] = {}
    for name, settings in variants.items():
        for variable in (OTLP, USAGE_RECORDS):
            os.environ.pop(variable, None)
        os.environ.update(settings)
        tree = arguments.before if name == "before" else None
        gateways[name] = await asyncio.to_thread(Gateway, str(model), tree=tree, workers=0)
        stack.callback(gateways[name].close)
    for gateway in gateways.values():
        await load(gateway.addresses["grpc"], 50, arguments.tokens)  # warm
    found = await take_turns(arguments, gateways, lambda: engine.register(client))
    if not any(span.service == "loraplex-gateway" for span in collector.spans):
        raise SystemExit("no span came: tracing was not on")
    await engine.kill()
    await client.aclose()
    return found


async def scrape(address: str) -> None:
    """Read the metrics of a gateway as Prometheus does, until cancelled."""
    while True:
        await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read())
        await asyncio.sleep(SCRAPE_INTERVAL_S)


async def take_turns(
    arguments: argparse.Namespace, gateways: dict[str, Gateway], register: Callable[[], Awaitable[None]]
) -> dict[str, list[float]]:
    """Return the gateways' CPU time for a request, in ms, of each round."""
    found: dict[str, list[float]] = {name: [] for name in gateways}
    for number in range(arguments.rounds):
        await register()  # the engine's lease is renewed by nothing else
        names = list(gateways)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # each in each place of a round
            gateway = gateways[name]
            before_s = gateway.cpu_s()
            scraper = asyncio.create_task(scrape(gateway.addresses["metrics"])) if name == "on" else None
            await load(gateway.addresses["grpc"], arguments.requests, arguments.tokens)
            await asyncio.sleep(1.0)  # records and spans gather for less
            if scraper is not None:
                await ended(scraper)
            found[name].append((gateway.cpu_s() - before_s) / arguments.requests * 1e3)
            print(f"{name:<9} {found[name][-1]:.3f} ms", flush=True)
    return found


async def ended(scraper: asyncio.Task[None]) -> None:
    """Cancel a scraper; raise what it failed with."""
    scraper.cancel()
    with suppress(asyncio.CancelledError):
        await scraper


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="tree of a commit to compare with, too")
    for name, default in (("--rounds", 12), ("--requests", 600), ("--tokens", 64)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--out", type=Path, help="file of the results, JSON")
    parser.add_argument("--commit", default="", help="written into the results")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name, ExitStack() as stack:
        found = asyncio.run(measure(arguments, Path(name), stack))
    medians = {name: statistics.median(values) for name, values in found.items()}
    added: dict[str, list[float]] = {}
    for variant in [name for name in found if name != "off"]:
        ratios = sorted(mine / bare - 1 for mine, bare in zip(found[variant], found["off"], strict=True))
        quarter = len(ratios) // 4
        added[variant] = [statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]]
        middle, low, high = added[variant]
        print(
            f"{variant:<9} {medians[variant]:.3f} ms a request, {middle:+.1%} (half of the rounds {low:+.1%} to {high:+.1%})"
        )
    if arguments.out:
        report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": arguments.commit}
        report |= {"machine": f"CPU, {os.cpu_count()} cores", "python": sys.version.split()[0]}
        report |= {"command": " ".join(["python", "benchmarks/gateway_observed.py", *sys.argv[1:]])}
        report |= {"tokens": arguments.tokens, "cpu_ms_per_request": found, "medians": medians, "added": added}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
