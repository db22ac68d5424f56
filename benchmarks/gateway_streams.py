"""How many events a second a gateway passes on, over SSE and gRPC, one per token and stream: this one and an older one.

Usage: ``python benchmarks/gateway_streams.py [--before DIR] [--workers 1 2] [--rounds 3] [--out FILE]``

Clients are also served without a gateway, by processes that stand where the engines are and write each stream's event
themselves (``direct``): what they see then at the same pace is no gateway's latency, and the rest is what it adds.

Engines are doubles that give each of the streams a token per step at a pace that rises from rung to rung; every part is a
process of its own. On eight cores or more a gateway has two for each of its workers, and the rest share the others.
In each round each gateway (that of `--before`, a tree with ``services`` and ``proto/gen`` of another commit, then this
tree's with each number of workers) serves SSE, then gRPC, through all rungs until it no longer keeps up: fewer than 95 %
of the tokens come, or fewer come as an event of their own. Told per gateway and face: the highest rate that was kept up,
what the gateway computes per event there, and the time from an engine's write to a client's read at half that rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loraplex_bench.streams.account import add_latency_added, medians, summary
from loraplex_bench.streams.parts import Direct, Gateway, Load, Part, cores_of

HERE = Path(__file__)
NUM_ENGINES = 2
FACES = ("sse", "grpc")
PACES = (4_000, 8_000, 12_500, 18_000, 25_000, 32_000, 40_000, 50_000, 65_000, 80_000)


def start_gateways(arguments: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Gateway | Direct]:
    """Start Valkey, the engines and all gateways, which idle until their turn."""
    from loraplex_common.valkey import EmbeddedValkey
    from support.base_models import TinyBase, write_base_model

    valkey = stack.enter_context(EmbeddedValkey(folder / "valkey"))
    os.environ["LORAPLEX_GATEWAY_REDIS_URL"] = valkey.url  # it has the password, so no command line shows it
    # Streams must not end within a run, whatever the pace.
    model = str(write_base_model(folder / "tiny", TinyBase(max_position_embeddings=65_536)))
    for n in range(NUM_ENGINES):
        command = [str(HERE), "engine", "--model", model, "--folder", str(folder), "--name", f"engine-{n}"]
        stack.callback(Part(command, cores=cores_of("others")).close)
    variants: dict[str, tuple[Path | None, int]] = {}
    if arguments.before:
        variants["before"] = (arguments.before, 0)
    variants |= {f"workers-{n}": (None, n) for n in arguments.workers}
    direct = [[str(HERE), "direct", "--folder", str(folder), "--name", f"direct-{n}"] for n in range(NUM_ENGINES)]
    gateways: dict[str, Gateway | Direct] = {"direct": Direct(direct)}
    stack.callback(gateways["direct"].close)
    for name, (tree, workers) in variants.items():
        gateways[name] = Gateway(model, tree=tree, workers=workers)
        stack.callback(gateways[name].close)
    return gateways


def compare(arguments: argparse.Namespace) -> int:
    """Run all rounds, print a line for each turn, write the results; return the exit code."""
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        gateways = start_gateways(arguments, folder, stack)
        for number in range(arguments.rounds):
            turns = [(variant, face) for face in FACES for variant in gateways if face in arguments.faces]
            # What a latency is without a gateway comes first: the others are compared with it.
            for variant, face in sorted(turns[:: -1 if number % 2 else 1], key=lambda turn: turn[0] != "direct"):
                load = Load(HERE, folder, arguments, run=f"{number}-{variant}-{face}")
                result = summary(load.run(gateways[variant], face))
                if variant != "direct":
                    add_latency_added(result, runs[f"direct {face}"][-1])
                runs.setdefault(f"{variant} {face}", []).append(result)
                told = "  ".join(f"{key} {value:,.2f}" for key, value in result.items() if key != "rungs")
                print(f"{variant:<10} {face:<4} {told}", flush=True)
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": arguments.commit}
    report |= {"machine": f"CPU, {os.cpu_count()} cores", "python": sys.version.split()[0]}
    report |= {"command": " ".join(["python", "benchmarks/gateway_streams.py", *sys.argv[1:]])}
    report |= {"streams": arguments.streams, "clients": arguments.clients}
    report |= {"medians": {key: medians(each) for key, each in runs.items()}, "runs": runs}
    report["ratios"] = ratios(report["medians"])
    for key, ratio in report["ratios"].items():
        print(f"{key}: {ratio:.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def ratios(of: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return how one gateway's kept rate compares with another's, by face."""
    result = {}
    for more, less in (("workers-1", "before"), ("workers-2", "workers-1")):
        for face in FACES:
            if f"{more} {face}" in of and f"{less} {face}" in of:
                rates = [of[f"{variant} {face}"]["kept_events_per_s"] for variant in (more, less)]
                result[f"{more} over {less}, {face}"] = rates[0] / rates[1]
    return result


def main() -> int:
    """Parse, run, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["compare", "engine", "direct", "client"], default="compare")
    parser.add_argument("--before", type=Path, help="tree of the commit to compare with")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of workers to run with")
    parser.add_argument("--faces", nargs="+", choices=FACES, default=list(FACES))
    for name, default in (("--streams", 256), ("--clients", 8), ("--connections", 64), ("--rounds", 3)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--rung-s", type=float, default=1.0, help="time at each pace")
    parser.add_argument("--paces", type=int, nargs="+", default=list(PACES), help="tokens a second, all streams")
    parser.add_argument("--out", type=Path, help="file of the results, JSON")
    parser.add_argument("--commit", default="", help="written into the results")
    for name in ("--target", "--model", "--name", "--face", "--run"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "compare":
        return compare(arguments)
    if arguments.part == "engine":
        from loraplex_bench.streams.engine import run_engine

        asyncio.run(run_engine(Path(arguments.model), arguments.folder, arguments.name))
        return 0
    from loraplex_bench.streams.clients import run_client, run_loop

    if arguments.part == "direct":
        from loraplex_bench.streams.direct import run_direct

        run_loop(run_direct(arguments.folder, arguments.name))
        return 0
    ids = [f"{arguments.run}-{n}" for n in range(arguments.streams)]
    run_client(arguments.face, arguments.target, ids, arguments.folder, arguments.name, arguments.connections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
