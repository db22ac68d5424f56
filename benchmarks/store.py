"""The adapter store's rates beside a copy of memory, a plain gRPC stream and redis-py's GET, all in one run.

    python benchmarks/store.py [--smoke] [--adapters 8] [--dtype bfloat16] [--pause-s 0] [--out benchmarks/results]

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
from loraplex_bench.store.rig import Fetched, Inputs, cpu_seconds, engine, fetch, running_store
from loraplex_bench.store.stages import stage_rates
from loraplex_common.valkey import EmbeddedValkey, connect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from support.store_rig import StoreClient

    Beside = tuple[tuple[str, float], tuple[str, float]]
    """What one image and several are compared with: names and rates in GB/s."""


AT_ONCE = 4
"""Images or imports that are asked for together."""


class Bench:
    """Runs the rows of one setting.

    Args:
        inputs: What stores are started with.
        adapters: Those that are imported one after another, then fetched.
        others: Those that are imported at once.
        results: Takes the rows.
    """

    def __init__(self, inputs: Inputs, adapters: Sequence[Path], others: Sequence[Path], results: Results) -> None:
        self.inputs = inputs
        self.adapters = adapters
        self.others = others
        self.results = results
        self.num_bytes = (adapters[0] / "adapter_model.safetensors").stat().st_size
        self.digests: list[str] = []
        self.pause_s = 0.0

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
        self.stages = await asyncio.to_thread(stage_rates, self.adapters[0], self.inputs.base, self.inputs.valkey_url)
        for name, rate in self.stages.items():
            self.add(f"stage of an import/{name}", rate)

    async def imports(self, client: StoreClient, pid: int) -> None:
        """Import adapters one after another, then the others at once."""
        name, slowest = min(self.stages.items(), key=lambda each: each[1])
        seconds, cpu_s = [], cpu_seconds(pid)
        for number, directory in enumerate(self.adapters):
            began = time.perf_counter()
            found = await client.import_dir(f"a{number}", directory)
            seconds.append(time.perf_counter() - began)
            self.digests.append(found.revision.revision)
        case, rate = "import/one after another", self.num_bytes / statistics.median(seconds) / 1e9
        self.add(case, rate, f"slowest stage: {name}", slowest)
        self.add_cpu(case, (cpu_seconds(pid) - cpu_s) / len(self.adapters))
        self.results.note(bar(case, rate / slowest, 0.4, f"the slowest stage ({name})"))
        began = time.perf_counter()
        await asyncio.gather(*(client.import_dir(f"b{n}", each) for n, each in enumerate(self.others)))
        rate = len(self.others) * self.num_bytes / (time.perf_counter() - began) / 1e9
        self.add(f"import/{len(self.others)} at once", rate, f"slowest stage: {name}", slowest)

    async def redis_rates(self) -> None:
        """Measure redis-py's GET of the same blobs."""
        client = connect(self.inputs.valkey_url)
        found = [
            sorted([key.decode() async for key in client.scan_iter(f"a:{{{digest}}}:c:*")]) for digest in self.digests
        ]
        await client.aclose()
        self.get = await asyncio.to_thread(get_rate, self.inputs.valkey_url, found[:1])
        self.add("redis-py GET/1 connection", self.get)
        self.gets = await asyncio.to_thread(get_rate, self.inputs.valkey_url, found[:AT_ONCE])
        self.add(f"redis-py GET/{AT_ONCE} processes", self.gets)

    async def images(
        self, client: StoreClient, pid: int, case: str, beside: Beside, wanted: float | None = None
    ) -> None:
        """Fetch images into an empty arena, one after another, then several at once.

        Args:
            client: The store's.
            pid: The store's process.
            case: Where the images come from.
            beside: What one image and several stand beside.
            wanted: The least share of it; None if none is asked for.
        """
        singles, together = self.digests[: max(1, len(self.digests) - AT_ONCE)], self.digests[-AT_ONCE:]
        async with engine(client, self.inputs, "engine") as peer:
            found: list[Fetched] = []
            for digest in singles:
                await asyncio.sleep(self.pause_s)
                found.append(await fetch(peer, [digest], pid))
            await asyncio.sleep(self.pause_s)
            self.add(f"{case}/first one", found[0].rate)
            rate = statistics.median(each.rate for each in found[1:] or found)
            self.add_beside(f"{case}/one", rate, beside[0], wanted)
            self.add_cpu(f"{case}/one", statistics.median(each.cpu_s for each in found[1:] or found))
            several = await fetch(peer, together, pid)
            self.add_beside(f"{case}/{len(together)} at once", several.rate, beside[1], wanted)
            self.add_cpu(f"{case}/{len(together)} at once", several.cpu_s / len(together))

    def add_beside(self, case: str, rate: float, beside: tuple[str, float], wanted: float | None) -> None:
        """Add a rate beside another one, and whether the share that is asked for is reached."""
        self.add(case, rate, *beside)
        if wanted is not None:
            self.results.note(bar(case, rate / beside[1], wanted, beside[0]))

    def add_cpu(self, case: str, seconds: float) -> None:
        """Add what one adapter costs the store's process: steadier than the clock on a machine that others use."""
        self.results.add(Row(suite="store", case=case, metric="store cpu/adapter", value=seconds * 1e3, unit="ms"))


def bar(case: str, share: float, wanted: float, of: str) -> str:
    """Return a line that says whether a share is what is asked for."""
    verdict = "reached" if share >= wanted else "NOT reached"
    return f"bar: {case}: {share:.2f} of {of}, at least {wanted:g} wanted on 8 cores and more: {verdict} on {os.cpu_count()}"


async def measure(bench: Bench, inputs: Inputs) -> None:
    """Run all rows."""
    await bench.peers()
    num_adapters = len(bench.adapters)
    async with running_store(inputs, "--prepare-images", "0", "--max-concurrent-imports", str(AT_ONCE)) as (
        client,
        pid,
    ):
        await bench.imports(client, pid)
    await bench.redis_rates()
    redis = (("redis-py GET/1 connection", bench.get), (f"redis-py GET/{AT_ONCE} processes", bench.gets))
    memory = (("slower of memcpy and hashes", min(bench.memcpy, bench.hash)),) * 2
    async with running_store(inputs, "--image-cache-bytes", "1") as (client, pid):
        await bench.images(client, pid, "Valkey to engine, first derivation", redis, 0.8)
    flags: tuple[str, ...] = ("--image-cache-bytes", str(2 * num_adapters * bench.num_bytes))
    async with running_store(inputs, *flags) as (client, pid):
        await bench.images(client, pid, "Valkey to engine, derived before", redis, 0.8)
        await bench.images(client, pid, "host memory to engine", memory, 0.7)
    flags = ("--disk-cache-dir", str(inputs.folder / "cache"), "--image-cache-bytes", "1")
    async with running_store(inputs, *flags) as (client, pid):
        await bench.images(client, pid, "Valkey to engine, disk written", redis)
        await on_disk(inputs.folder / "cache", num_adapters)
    async with running_store(inputs, *flags) as (client, pid):
        await bench.images(client, pid, "disk to engine, page cache, first use", memory)
        await bench.images(client, pid, "disk to engine, page cache", memory)


async def on_disk(folder: Path, num_images: int) -> None:
    """Wait until images are on disk; a store leaves out what comes faster than its disk."""
    for _ in range(200):
        if len(await asyncio.to_thread(lambda: list(folder.glob("*.image")))) >= num_images:
            return
        await asyncio.sleep(0.1)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="all on a tiny model")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of the checkpoints")
    parser.add_argument("--engine-dtype", default="bfloat16", help="of the images")
    parser.add_argument("--pause-s", type=float, default=0.0, help="between images, for what the store does meanwhile")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    results = Results()
    results.print_head()
    results.note(
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before, checkpoints {args.dtype}, images {args.engine_dtype}, {args.pause_s:g} s between images"
    )
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey(Path(name) / "valkey") as valkey:
        folder = Path(name)
        base = write_base(folder / "base", TINY if args.smoke else LLAMA3_8B)
        (folder / "adapters").mkdir()
        adapters = write_adapters(folder / "adapters", folder / "base", args.adapters + AT_ONCE, args.dtype)
        num_slots = 60 * args.adapters * (1 if args.dtype != "float32" else 2)
        inputs = Inputs(folder=folder, base=base, valkey_url=valkey.url, dtype=args.engine_dtype, num_slots=num_slots)
        bench = Bench(inputs, adapters[: args.adapters], adapters[args.adapters :], results)
        bench.pause_s = args.pause_s
        asyncio.run(measure(bench, inputs))
    if args.out is not None:
        results.write(args.out, "store", commit=args.commit)


if __name__ == "__main__":
    main()
