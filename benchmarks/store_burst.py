"""A burst over many adapters, whole stack: with the adapters in the arena, cold out of Valkey, and cold from the store's disk.

    python benchmarks/store_burst.py --model DIR [--adapters 64] [--requests 512] [--out benchmarks/results]
    python benchmarks/store_burst.py --write-model DIR     # Llama-3-8B's shape with random weights, 16 GB, then the same
    python benchmarks/store_burst.py --smoke               # a tiny model, without a GPU

Each cold burst has a `loraplex serve` of its own, started anew, so that host memory and arena are empty; the kernel's page
cache is left as it is, and a second look at the disk after ``sync; echo 1 > /proc/sys/vm/drop_caches`` is the operator's. Each
server first answers a burst without adapters. Adapters are of all seven projections, rank 16, bf16; requests take them in
turns. A row's peer is the burst whose adapters are in the arena: wall times, of which the cold ones may be 1.25 and 1.6 times as
long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.store.inputs import LLAMA3_8B, TINY, write_adapters, write_random_model
from support.base_models import write_base_model
from support.serve_process import ServeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROMPT, OUTPUT = 256, 128
DISK = "LORAPLEX_ADAPTER_STORE_DISK_CACHE_DIR"
WARM = "adapters in the arena"


class Burst:
    """Runs bursts of one size on servers of one model.

    Args:
        args: The command line.
        folder: Holds data and adapters.
        model: The base model's directory.
        serve_flags: Flags of every server.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, model: Path, serve_flags: Sequence[str]) -> None:
        self._args = args
        self._folder = folder
        self._flags = ("--model", str(model), "--import-root", str(folder), *serve_flags)
        self._prompt, self._output = (8, 4) if args.smoke else (PROMPT, OUTPUT)
        self.results = Results()
        self._warm_s = 0.0

    @contextmanager
    def server(self, disk: Path | None = None) -> Iterator[ServeProcess]:
        """Run a server on the adapters that were imported."""
        variables = {DISK: str(disk)} if disk is not None else {}
        os.environ.update(variables)  # services take their flags from there
        try:
            server = ServeProcess(self._folder / "data", *self._flags)
        finally:
            for name in variables:
                del os.environ[name]
        try:
            self._load(server, adapters=0, seed=1)
            yield server
        finally:
            server.terminate()

    def import_all(self, server: ServeProcess, adapters: Sequence[Path]) -> None:
        """Import adapters as a0, a1 and so on."""
        for number, directory in enumerate(adapters):
            command = ["adapters", "import", f"a{number}", str(directory), "--store-target", server.store]
            subprocess.run([sys.executable, "-m", "loraplex_client", *command], check=True, stdout=subprocess.DEVNULL)

    def measure(self, server: ServeProcess, case: str, seed: int, most: float | None = None) -> None:
        """Run the burst and add its rows.

        Args:
            server: The server.
            case: Where the adapters are.
            seed: Seed of the prompts, so that no prefix is cached.
            most: How many times the warm burst's wall time this one may take.
        """
        figures = self._load(server, adapters=self._args.adapters, seed=seed)
        wall_s = float(figures["wall_s"])
        if case == WARM:
            self._warm_s = wall_s
        floor = self._warm_s * most if most is not None else None
        for metric, value, unit in (
            ("wall", wall_s, "s"),
            ("output", float(figures["output_tokens_per_s"]), "tok/s"),
            ("ttft p99", float(figures["ttft_p99_s"]), "s"),
        ):
            is_wall = metric == "wall" and bool(self._warm_s)
            self.results.add(
                Row(
                    suite="store",
                    case=f"burst/{case}",
                    metric=metric,
                    value=value,
                    unit=unit,
                    floor=floor if is_wall else None,
                    peer=WARM if is_wall else "",
                    peer_value=self._warm_s if is_wall else None,
                )
            )

    def _load(self, server: ServeProcess, *, adapters: int, seed: int) -> dict[str, Any]:
        workload = f"burst:{adapters}:{self._args.requests}"
        sizes = ["--prompt", str(self._prompt), "--output", str(self._output), "--vocab-size", "300"]
        command = ["load", "--workload", workload, *sizes, "--seed", str(seed), "--json", "--target", server.grpc]
        done = subprocess.run(
            [sys.executable, "-m", "loraplex_client", *command], check=True, stdout=subprocess.PIPE, text=True
        )
        figures: dict[str, Any] = json.loads(done.stdout)
        if figures["finished"] != figures["requests"]:
            raise SystemExit(
                f"only {figures['finished']} of {figures['requests']} requests finished: {figures['errors']}"
            )
        return figures


def run(burst: Burst, adapters: Sequence[Path], disk: Path) -> None:
    """Run all bursts."""
    burst.results.print_head()
    with burst.server() as server:
        burst.import_all(server, adapters)
        burst.measure(server, "first after the imports", seed=2)
        burst.measure(server, WARM, seed=3)
    with burst.server() as server:
        burst.measure(server, "cold, from Valkey", seed=4, most=1.6)
    with burst.server(disk) as server:
        burst.measure(server, "cold, from Valkey, disk written beside", seed=5)
        burst.measure(server, f"{WARM}, again", seed=6)
    with burst.server(disk) as server:
        burst.measure(server, "cold, from the disk's files in the page cache", seed=7, most=1.25)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--write-model", type=Path, metavar="DIR")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--arena-bytes", default="16GiB", help="of the engine; the adapters must fit")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    if not (args.smoke or args.model or args.write_model):
        parser.error("one of --model, --write-model and --smoke is needed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [] if args.smoke else ["--arena-bytes", args.arena_bytes]
        if args.smoke:
            model = write_base_model(folder / "tiny", TINY)
            args.adapters, args.requests = min(args.adapters, 4), min(args.requests, 16)
        elif args.write_model:
            model = write_random_model(args.write_model, LLAMA3_8B)
        else:
            model = args.model
        (folder / "adapters").mkdir()
        adapters = write_adapters(folder / "adapters", model, args.adapters, "bfloat16")
        burst = Burst(args, folder, model, flags)
        run(burst, adapters, folder / "disk")
        if args.out is not None:
            burst.results.write(args.out, "store-burst", commit=args.commit)


if __name__ == "__main__":
    main()
