"""What usage ledger, metrics and traces cost a gateway: CPU time of its process for each request, beside an older one's.

Usage: ``python benchmarks/gateway_observed.py --before DIR [--rounds 12] [--requests 200] [--tokens 64] [--out FILE]``

The gateway of `--before`, a tree with ``services`` and ``proto/gen`` of another commit, then this tree's, then this tree's with
every request traced to a collector, serve the same streams from the same engine double, in turns. CPU time is what bounds a
gateway's throughput, and tells more on a busy machine than the time that passes. Told: CPU per request of each, the median over
the rounds, and what is added to the older one's in the same round: the median, and the range of the middle half of the rounds.
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
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_bench.streams.parts import Gateway

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

CONCURRENT = 32
OTLP = "LORAPLEX_GATEWAY_OTLP_ENDPOINT"


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
    for name, tree in (("before", arguments.before), ("observed", None), ("traced", None)):
        os.environ.pop(OTLP, None)
        if name == "traced":
            os.environ[OTLP] = collector.target
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


async def take_turns(
    arguments: argparse.Namespace, gateways: dict[str, Gateway], register: Callable[[], Awaitable[None]]
) -> dict[str, list[float]]:
    """Return the gateways' CPU time for a request, in ms, of each round."""
    found: dict[str, list[float]] = {name: [] for name in gateways}
    for number in range(arguments.rounds):
        await register()  # the engine's lease is renewed by nothing else
        for name in list(gateways)[:: -1 if number % 2 else 1]:
            before_s = gateways[name].cpu_s()
            await load(gateways[name].addresses["grpc"], arguments.requests, arguments.tokens)
            await asyncio.sleep(1.0)  # records and spans gather for less
            found[name].append((gateways[name].cpu_s() - before_s) / arguments.requests * 1e3)
            print(f"{name:<9} {found[name][-1]:.3f} ms", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="tree of the commit to compare with")
    for name, default in (("--rounds", 12), ("--requests", 200), ("--tokens", 64)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--out", type=Path, help="file of the results, JSON")
    parser.add_argument("--commit", default="", help="written into the results")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name, ExitStack() as stack:
        found = asyncio.run(measure(arguments, Path(name), stack))
    medians = {name: statistics.median(values) for name, values in found.items()}
    added: dict[str, list[float]] = {}
    for variant in ("observed", "traced"):
        ratios = sorted(mine / before - 1 for mine, before in zip(found[variant], found["before"], strict=True))
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
