"""The adapter store's rates beside a copy of memory, a plain gRPC stream and redis-py's GET, all in one run.

    python benchmarks/store.py [--smoke] [--adapters 8] [--dtype bfloat16] [--out benchmarks/results]

A real Valkey, a store in a process of its own, and an engine's side of the protocol in this one, with a real arena in
shared memory. Adapters are of Llama-3-8B, all seven projections, rank 16: 80 MiB. No GPU is needed: nothing is computed.
Rates are bytes of the canonical form or of the image per second, as each row says. ``--smoke`` runs all on a tiny model.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.store.inputs import LLAMA3_8B, TINY, write_adapters, write_base
from loraplex_bench.store.peers import get_rate, grpc_rate, hash_rate, memcpy_rate
from loraplex_bench.store.rig import Inputs, engine, fetch, running_store
from loraplex_common.valkey import EmbeddedValkey, connect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from support.store_rig import StoreClient


class Bench:
    """Runs the rows of one setting."""

    def __init__(self, inputs: Inputs, adapters: Sequence[Path], results: Results) -> None:
        self.inputs = inputs
        self.adapters = adapters
        self.results = results
        self.num_bytes = (adapters[0] / "adapter_model.safetensors").stat().st_size
        self.digests: list[str] = []

    def add(self, case: str, gb_per_s: float, peer: str = "", peer_value: float | None = None) -> None:
        """Add a rate."""
        self.results.add(
            Row(suite="store", case=case, metric="rate", value=gb_per_s, unit="GB/s", peer=peer, peer_value=peer_value)
        )

    async def peers(self) -> None:
        """Measure what the store's rates stand beside."""
        self.memcpy = memcpy_rate(self.num_bytes)
        self.add("memcpy/1 thread", self.memcpy)
        for threads in sorted({1, max(1, (os.cpu_count() or 1) // 2), os.cpu_count() or 1}):
            self.hash = hash_rate(self.num_bytes, threads)
            self.add(f"sha256 of 1 MiB pieces/{threads} threads", self.hash)
        self.add("plain gRPC stream/1 MiB messages", await grpc_rate(self.num_bytes))

    async def imports(self, client: StoreClient) -> None:
        """Import every adapter, one after another."""
        seconds = []
        for number, directory in enumerate(self.adapters):
            began = time.perf_counter()
            found = await client.import_dir(f"a{number}", directory)
            seconds.append(time.perf_counter() - began)
            self.digests.append(found.revision.revision)
        self.add("import/one after another", self.num_bytes / statistics.median(seconds) / 1e9)

    async def redis_rates(self) -> None:
        """Measure redis-py's GET of the same blobs."""
        client = connect(self.inputs.valkey_url)
        found = [
            sorted([key.decode() async for key in client.scan_iter(f"a:{{{digest}}}:c:*")]) for digest in self.digests
        ]
        await client.aclose()
        self.get = await asyncio.to_thread(get_rate, self.inputs.valkey_url, found[:1])
        self.add("redis-py GET/1 connection", self.get)
        self.gets = await asyncio.to_thread(get_rate, self.inputs.valkey_url, found[:4])
        self.add("redis-py GET/4 processes", self.gets)

    async def cold(self, client: StoreClient, tier: str) -> None:
        """Fetch images that the store does not have in memory: one, then the others at once."""
        async with engine(client, self.inputs, "engine-cold") as peer:
            seconds, num_bytes = await fetch(peer, self.digests[:1])
            self.add(f"{tier} to engine/one", num_bytes / seconds / 1e9, "redis-py GET/1 connection", self.get)
            rest = self.digests[1:]
            seconds, num_bytes = await fetch(peer, rest)
            self.add(
                f"{tier} to engine/{len(rest)} at once",
                num_bytes / seconds / 1e9,
                "redis-py GET/4 processes",
                self.gets,
            )

    async def warm(self, client: StoreClient) -> None:
        """Fetch what the store has in memory."""
        slower = min(self.memcpy, self.hash)
        for attempt in range(2):
            async with engine(client, self.inputs, f"engine-warm-{attempt}") as peer:
                seconds, num_bytes = await fetch(peer, self.digests[:1])
                one = num_bytes / seconds / 1e9
                rest = self.digests[1:]
                seconds, num_bytes = await fetch(peer, rest)
        self.add("warm image to engine/one", one, "slower of memcpy and hashes", slower)
        self.add(
            f"warm image to engine/{len(rest)} at once",
            num_bytes / seconds / 1e9,
            "slower of memcpy and hashes",
            slower,
        )


async def measure(inputs: Inputs, adapters: Sequence[Path], results: Results) -> None:
    """Run all rows."""
    bench = Bench(inputs, adapters, results)
    await bench.peers()
    async with running_store(inputs) as client:
        await bench.imports(client)
    await bench.redis_rates()
    cache = ("--image-cache-bytes", str(2 * len(adapters) * bench.num_bytes))
    async with running_store(inputs, *cache) as client:
        await bench.cold(client, "Valkey")
        await bench.warm(client)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="all on a tiny model")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of the checkpoints")
    parser.add_argument("--engine-dtype", default="bfloat16", help="of the images")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    results = Results()
    results.print_head()
    results.note(f"{os.cpu_count()} cores, checkpoints {args.dtype}, images {args.engine_dtype}")
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey(Path(name) / "valkey") as valkey:
        folder = Path(name)
        base = write_base(folder / "base", TINY if args.smoke else LLAMA3_8B)
        (folder / "adapters").mkdir()
        adapters = write_adapters(folder / "adapters", folder / "base", args.adapters, args.dtype)
        num_slots = 60 * args.adapters * (1 if args.dtype != "float32" else 2)
        inputs = Inputs(folder=folder, base=base, valkey_url=valkey.url, dtype=args.engine_dtype, num_slots=num_slots)
        asyncio.run(measure(inputs, adapters, results))
    if args.out is not None:
        results.write(args.out, "store", commit=args.commit)


if __name__ == "__main__":
    main()
