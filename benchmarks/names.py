"""What very many names cost a store and a gateway: calls at a steady rate, memory, restarts.

    python benchmarks/names.py [--names 100000] [--rate 500] [--seconds 20] [--out benchmarks/results]

A real Valkey, store and gateway, each a process; the load comes from this one. The names are written as imports
leave them, two revisions each, without weights: nothing here reads them. Latency counts from when a
call was due. Memory is the resident set (RSS) less that of the same process on an empty catalog.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_bench.names.load import Load
from loraplex_bench.names.services import Service, gateway, store, whole_table
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.store.inputs import TINY, write_base
from loraplex_common.valkey import EmbeddedValkey, connect
from support.many_names import digest_of, name_of, write_names

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from loraplex_common.base_model import BaseModelInfo
    from support.store_rig import StoreClient


class Bench:
    """Runs the parts of one setting.

    Args:
        folder: Has the base model and gets logs.
        valkey_url: The Valkey of both services, password included.
        num_names: Names in the catalog.
        results: Gets the rows.
    """

    def __init__(self, folder: Path, valkey_url: str, num_names: int, results: Results) -> None:
        self.folder = folder
        self.valkey_url = valkey_url
        self.num_names = num_names
        self.results = results
        self.empty_store, self.empty_gateway = 0, 0

    def add(self, case: str, metric: str, value: float, unit: str, *, bar: float | None = None, peer: str = "") -> None:
        """Add a row; ``bar`` is what it is to stay under."""
        row = Row(
            suite="names",
            case=f"{self.num_names} names/{case}",
            metric=metric,
            value=value,
            unit=unit,
            peer=peer or ("bar" if bar is not None else ""),
            peer_value=bar,
        )
        self.results.add(row)

    async def empty(self) -> None:
        """Note what store and gateway take without names."""
        async with self.store() as (running, client):
            await client.names()
            self.empty_store = running.rss_bytes
            async with self.gateway(running) as gateway:
                self.empty_gateway, start_s = gateway.rss_bytes, gateway.start_s
        self.add("store, empty", "RSS", self.empty_store / 1e6, "MB")
        self.add("gateway, empty", "RSS", self.empty_gateway / 1e6, "MB")
        self.add("gateway, empty", "start", start_s, "s")

    def store(self) -> AbstractAsyncContextManager[tuple[Service, StoreClient]]:
        """Run a store."""
        return store(self.folder, self.valkey_url)

    def gateway(self, running: Service) -> AbstractAsyncContextManager[Service]:
        """Run a gateway on a store."""
        return gateway(self.folder, self.valkey_url, running.process.grpc)

    async def peers(self, repeats: int = 200) -> None:
        """Measure Valkey's own GET and WAITAOF as redis-py sees them."""
        async with connect(self.valkey_url) as valkey:
            gets, fsyncs = [], []
            for _ in range(repeats):
                began = time.perf_counter()
                await valkey.get("bench:names")
                gets.append(time.perf_counter() - began)
            single: Any = valkey.client()  # redis-py has no types for single commands
            async with single as connection:
                for number in range(20):
                    await connection.set("bench:names", number)
                    began = time.perf_counter()
                    await connection.execute_command("WAITAOF", 1, 0, 5000)
                    fsyncs.append(time.perf_counter() - began)
        self.add_spread("redis-py GET", gets)
        self.add_spread("Valkey WAITAOF", fsyncs)

    def add_spread(self, case: str, seconds: list[float], *, bar_ms: float | None = None) -> None:
        """Add median and 99th percentile of some latencies."""
        self.add(case, "p50", statistics.median(seconds) * 1e3, "ms")
        at = sorted(seconds)[min(len(seconds) - 1, round(0.99 * len(seconds)))]
        self.add(case, "p99", at * 1e3, "ms", bar=bar_ms)

    async def restart(self) -> None:
        """Start a store on the full catalog: to the first right answer, and until the table is read."""
        began = time.perf_counter()
        async with self.store() as (running, client):
            found = await client.get(name_of(self.num_names // 2))
            assert found.revision.revision == digest_of(self.num_names // 2, 1)
            self.add("store restart", "first answer", time.perf_counter() - began, "s", bar=3.0)
            assert await whole_table(client) == self.num_names
            self.add("store restart", "table sent", time.perf_counter() - began, "s")
            self.add("store restart", "CPU", running.cpu_s, "s")
            await self.memory(running)

    async def memory(self, running: Service) -> None:
        """Add what a name costs in the store's memory and the gateway's, and the gateway's start."""
        each = (running.rss_bytes - self.empty_store) / self.num_names
        self.add("store", "RSS/adapter", each, "B", bar=2048.0)
        async with self.gateway(running) as gateway:
            grown = (gateway.rss_bytes - self.empty_gateway) / 1e6
            self.add("gateway", "RSS of names", grown, "MB", bar=300.0)
            self.add("gateway", "start", gateway.start_s, "s", bar=5.0)
            self.add("gateway", "start CPU", gateway.cpu_s, "s")

    async def load(self, rate: float, seconds: float) -> None:
        """Add the latencies of a mix of calls, and what one costs the store."""
        async with self.store() as (running, client):
            assert await whole_table(client) == self.num_names
            load = Load(client, self.num_names)
            await load.prepare()
            await load.run(rate, 1.0)
            load.seconds.clear()
            before = running.cpu_s
            await load.run(rate, seconds)
            spent = running.cpu_s - before
            case = f"{rate:g}/s"
            for kind, bar_ms in (("get", 5.0), ("list", 5.0), ("move", None)):
                self.add_spread(f"{case}/{kind}", load.seconds[kind], bar_ms=bar_ms)
            self.add(case, "store CPU/call", spent / (rate * seconds) * 1e3, "ms")
            self.add(case, "failed", sum(map(len, load.failures.values())), "calls")
            for kind, messages in load.failures.items():
                self.results.note(f"{kind}: {len(messages)} failed, first: {messages[0]}")
            for kind in ("get", "list", "move"):
                before = running.cpu_s
                await load.run_one_kind(kind, 50.0, 4.0)
                self.add(f"{kind} alone", "store CPU/call", (running.cpu_s - before) / 200 * 1e3, "ms")


async def measure(bench: Bench, base: BaseModelInfo, args: argparse.Namespace) -> None:
    """Run all parts."""
    results = bench.results
    await bench.empty()
    async with connect(bench.valkey_url) as valkey:
        began = time.perf_counter()
        await write_names(valkey, base, args.names, revisions=2)
        results.note(f"{args.names} names written in {time.perf_counter() - began:.1f} s")
        used = (await valkey.info("memory"))["used_memory"]
        bench.add("Valkey", "memory/adapter", used / args.names, "B")
    await bench.peers()
    await bench.restart()
    await bench.load(args.rate, args.seconds)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=500.0, help="calls a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    results = Results()
    results.print_head()
    results.note(f"{os.cpu_count()} cores; load average at the start {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey(Path(name) / "valkey") as valkey:
        folder = Path(name)
        base = write_base(folder / "base", TINY)
        asyncio.run(measure(Bench(folder, valkey.url, args.names, results), base, args))
    results.note(f"load average at the end {os.getloadavg()[0]:.1f}")
    if args.out is not None:
        results.write(args.out, "names", commit=args.commit)


if __name__ == "__main__":
    main()
