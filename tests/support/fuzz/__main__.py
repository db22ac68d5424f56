"""Mutated inputs at all that reads what strangers send: no crash, no bug, no unbounded memory.

``python -m support.fuzz --seconds 600`` (``make fuzz``) goes on for a time, ``--cases 200`` for a number of inputs. A process of
its own reads them, with a limit on its address space, so that a fault of native code or a hunger for memory ends that process
only; its last input lies in ``--keep DIR``. Each input is made from the seed and its number alone: ``--seed S --first N
--cases 1`` makes it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from support.fuzz.files import FileTargets, Target
from support.fuzz.streams import StreamTargets, send_many
from support.store_rig import running_rig, store_config
from support.valkey import fresh_database, running_server

ROOM_BYTES: Final = 1536 * 1024 * 1024
"""Address space beyond what the process has when it starts to read: threads and their heaps take most of it."""
MAX_GROWTH_BYTES: Final = 256 * 1024 * 1024
"""Memory that it may have grown by in the second half of its inputs."""
SLOW_S: Final = 10.0
STREAMS_AT_ONCE: Final = 4
MAX_WRONG: Final = 20


@dataclass
class FuzzTally:
    """The results.

    Attributes:
        outcomes: Target -> how its inputs ended -> how many.
        slowest_s: Target -> the longest time that an input took.
        grown_bytes: What resident memory grew by in the second half.
        wrong: What went wrong, with the number of the input.
    """

    seed: int
    num_cases: int = 0
    seconds: float = 0.0
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)
    slowest_s: dict[str, float] = field(default_factory=dict)
    grown_bytes: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, target: str, outcome: str, took_s: float) -> None:
        """Count an input."""
        self.num_cases += 1
        ends = self.outcomes.setdefault(target, {})
        ends[outcome] = ends.get(outcome, 0) + 1
        self.slowest_s[target] = round(max(took_s, self.slowest_s.get(target, 0.0)), 3)


class Fuzzer:
    """Makes inputs and has them read.

    Args:
        keep: Directory for the input that is being read; None keeps none.
    """

    def __init__(self, tally: FuzzTally, keep: Path | None, first: int) -> None:
        self._tally = tally
        self._keep = keep
        self._number = first

    def next(self, target: str) -> Random:
        """Return the random numbers of the next input of a target."""
        self._number += 1
        return Random(f"{self._tally.seed}/{target}/{self._number}")

    def read(self, target: Target) -> None:
        """Have one target read an input."""
        rng = self.next(target.name)
        data = target.mutate(rng, rng.choice(target.corpus), target.corpus)
        if self._keep is not None:
            (self._keep / "input").write_bytes(data)
            (self._keep / "target").write_text(f"{target.name} {self._number}")
        began = time.monotonic()
        try:
            outcome = target.read(data)
        except Exception as error:
            outcome = "WRONG"
            self.wrong(target.name, error)
        self._took(target.name, outcome, time.monotonic() - began)

    async def stream(self, targets: StreamTargets) -> None:
        """Have the store read a few streams."""
        rngs = [self.next("stream") for _ in range(STREAMS_AT_ONCE)]
        began = time.monotonic()
        for outcome in await send_many(targets, rngs):
            if isinstance(outcome, BaseException):
                self.wrong("stream", outcome)
            told = "WRONG" if isinstance(outcome, BaseException) else outcome
            self._took("stream", told, time.monotonic() - began)

    def wrong(self, target: str, error: BaseException) -> None:
        """Note what went wrong."""
        if len(self._tally.wrong) < MAX_WRONG:
            where = traceback.format_exception(error)[-4:]
            self._tally.wrong.append(f"{target} {self._number}: {''.join(where)[-1500:]}")

    def _took(self, target: str, outcome: str, took_s: float) -> None:
        self._tally.note(target, outcome, took_s)
        if took_s > SLOW_S:
            self.wrong(target, TimeoutError(f"it took {took_s:.1f} s"))


async def _run(options: argparse.Namespace, tally: FuzzTally, directory: Path) -> None:
    keep = None if options.keep is None else Path(options.keep)
    fuzzer = Fuzzer(tally, keep, options.first)
    files = await asyncio.to_thread(FileTargets, directory)
    targets = await asyncio.to_thread(files.targets)
    try:
        with running_server(directory / "valkey") as valkey:
            async with running_rig(store_config(fresh_database(valkey), log_level="error")) as (store, client):
                streams = StreamTargets(client)
                await streams.check_alive()
                await asyncio.to_thread(_go_on, fuzzer, targets[:1], 1)
                _limit_memory()
                await _rounds(options, tally, fuzzer, targets, streams)
                await streams.check_alive()
                store.check_integrity()
    finally:
        await asyncio.to_thread(files.close)


async def _rounds(
    options: argparse.Namespace, tally: FuzzTally, fuzzer: Fuzzer, targets: list[Target], streams: StreamTargets
) -> None:
    """Read until time or number is over, each target in turn."""
    began, halfway_bytes = time.monotonic(), 0
    while True:
        done = max((time.monotonic() - began) / options.seconds, tally.num_cases / options.cases)
        if done >= 1:
            break
        if done >= 0.5 and not halfway_bytes:
            halfway_bytes = _memory_bytes()[1]
        count = min(20, max(1, (options.cases - tally.num_cases) // (len(targets) + 1)))
        await asyncio.to_thread(_go_on, fuzzer, targets, count)
        for _ in range(max(1, count // STREAMS_AT_ONCE)):
            await fuzzer.stream(streams)
    tally.grown_bytes = _memory_bytes()[1] - (halfway_bytes or _memory_bytes()[1])
    if tally.grown_bytes > MAX_GROWTH_BYTES:
        tally.wrong.append(f"memory grew by {tally.grown_bytes} bytes in the second half")


def _go_on(fuzzer: Fuzzer, targets: list[Target], count: int) -> None:
    for target in targets:
        for _ in range(count):
            fuzzer.read(target)


def _limit_memory() -> None:
    """Limit this process' address space; children raise the limit again as far as their own share."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory_bytes()[0] + ROOM_BYTES, hard))


def _memory_bytes() -> tuple[int, int]:
    """Return this process' address space and its resident memory."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[1]) * resource.getpagesize()


def read_inputs(options: argparse.Namespace) -> FuzzTally:
    """Read inputs in this process."""
    tally, began = FuzzTally(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="loraplex-fuzz-") as directory:
        asyncio.run(_run(options, tally, Path(directory)))
    tally.seconds = round(time.monotonic() - began, 1)
    return tally


def fuzz(*, seed: int, cases: int, seconds: float, first: int = 0) -> dict[str, Any]:
    """Read inputs in a process of its own; return its tally as JSON would have it."""
    with tempfile.TemporaryDirectory(prefix="loraplex-fuzz-") as keep:
        numbers = ("--seed", str(seed), "--cases", str(cases), "--seconds", str(seconds), "--first", str(first))
        command = [sys.executable, "-m", "support.fuzz", "--child", *numbers, "--keep", keep]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found
        name = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
        last = Path(keep, "target")
        wrong = f"the process ended with {name} at {last.read_text() if last.exists() else 'its start'}"
        tally = asdict(FuzzTally(seed, wrong=[wrong]))
        tally["input"] = Path(keep, "input").read_bytes()[:65_536].hex() if last.exists() else ""
        return tally


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--cases", type=int, default=10**9, help="stop after that many inputs")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after that time")
    parser.add_argument("--first", type=int, default=0, help="number of the input before the first one")
    parser.add_argument("--keep", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    options = parser.parse_args()
    if options.cases < 1 or options.seconds <= 0:
        parser.error("--cases and --seconds must be positive")
    options.seed = int(time.time()) if options.seed is None else options.seed
    if options.child:
        print(json.dumps(asdict(read_inputs(options))))
        return 0
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    tally = fuzz(seed=options.seed, cases=options.cases, seconds=options.seconds, first=options.first)
    text = json.dumps({"commit": commit, **tally}, indent=2)
    print(text)
    if options.results is not None:
        (options.results / f"fuzz_{commit[:12]}_{options.seed}.json").write_text(text + "\n")
    return 1 if tally["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
