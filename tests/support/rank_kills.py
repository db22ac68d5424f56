"""Ranks of a tensor-parallel engine are killed while it decodes, loads adapters, starts or idles.

``python -m support.rank_kills --kills 50 --seed 1`` kills so many times during decode, and beside that some times while adapters
are loaded, before the engine is ready, and while it idles. Which rank, and when, is drawn from the seed. A stack of its own is around
the engine: Valkey, store, gateway. Each time all processes of the engine have to be gone within `GONE_S`, an engine is started in
their place, streams that the gateway has kept must end as undisturbed ones do, and what it serves from then on, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import LoraplexError
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.generation import greedy_all, start
from support.rank_processes import followers_of, is_alive
from support.stack import Stack, StackFlags, running_stack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from support.processes import ServiceProcess

GONE_S: Final = 2.0
OTHER_PHASES: Final = ("load", "start", "idle")
PHASES: Final = ("decode", *OTHER_PHASES)
DECODES_PER_OTHERS: Final = 10
"""Each of the other phases has one kill for so many during decode."""
RECIPES: Final = {"small": Recipe(seed=1, rank=3), "large": Recipe(seed=2, rank=8, targets=("q_proj", "down_proj"))}
SERVED: Final = (None, *RECIPES)
STREAM_TOKENS: Final = 200
CHECK_TOKENS: Final = 16
MOST_START_DELAY_S: Final = 2.0
MOST_LOAD_DELAY_S: Final = 0.05
SPAWNED_S: Final = 30.0


@dataclass
class RankKillTally:
    """The results of a campaign.

    Attributes:
        num_kills: Phase -> kills.
        ranks: Rank -> kills.
        num_streams: Streams that were under way when a rank was killed: how they ended -> how many.
        gone_s: Seconds from each kill to the end of the engine's last process, in order.
        wrong: What went wrong.
    """

    seed: int
    degrees: list[int]
    num_kills: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    num_streams: dict[str, int] = field(default_factory=dict)
    gone_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def times(self) -> dict[str, float]:
        """Median and largest of the times to the end of the last process, in seconds."""
        return {"p50_s": round(statistics.median(self.gone_s), 3), "max_s": round(max(self.gone_s), 3)}


class _Campaign:
    """Kills of one stack's engine.

    Args:
        stack: Runs; its newest engine serves.
        degree: Ranks of the engine.
        rng: Draws ranks and moments.
        tally: Gets the results.
    """

    def __init__(self, stack: Stack, degree: int, rng: random.Random, tally: RankKillTally) -> None:
        self._stack, self._degree, self._rng, self._tally = stack, degree, rng, tally
        self._expected: list[list[int]] = []

    async def run(self, phases: Sequence[str]) -> None:
        """Kill once for each phase."""
        async with self._stack.client() as client:
            for name in RECIPES:
                await client.adapters.import_directory(name, self._stack.import_root / name)
            self._expected = await greedy_all(client, SERVED, STREAM_TOKENS)
        for number, phase in enumerate(phases):
            try:
                await getattr(self, f"_kill_in_{phase}")()
                await self._check_service()
            except Exception as error:
                self._wrong(phase, f"kill {number}: {type(error).__name__}: {error}")
                return

    async def _kill_in_decode(self) -> None:
        await self._kill_under_streams("decode", after_tokens=self._rng.randint(1, STREAM_TOKENS // 2))

    async def _kill_in_load(self) -> None:
        """Kill while a new engine, which holds no adapter yet, loads those that streams ask for."""
        await self._kill_in_idle()
        await asyncio.to_thread(self._start)
        await self._kill_under_streams("load", after_tokens=0)

    async def _kill_in_idle(self) -> None:
        await self._kill(self._stack.engines[-1], "idle")

    async def _kill_in_start(self) -> None:
        """Kill a rank of an engine that is not ready, in the place of one that has ended."""
        old = self._stack.engines[-1]
        await asyncio.to_thread(old.stop)
        engine = self._stack.spawn_engine()
        give_up_at = time.monotonic() + SPAWNED_S
        while len(followers_of(engine.pid)) < self._degree - 1:
            assert time.monotonic() < give_up_at, f"ranks are not started\n{engine.log()}"
            await asyncio.sleep(0.01)
        await asyncio.sleep(self._rng.uniform(0, MOST_START_DELAY_S))
        await self._kill(engine, "start")

    async def _kill_under_streams(self, phase: str, *, after_tokens: int) -> None:
        """Kill once the first stream has so many tokens, or a drawn moment after the streams have begun."""
        seen: list[list[int]] = [[] for _ in SERVED]
        has_enough = asyncio.Event()

        async with self._stack.client() as client:

            async def read(at: int, adapter: str | None) -> str:
                try:
                    async for event in start(client, adapter, STREAM_TOKENS):
                        seen[at].extend(event.token_ids)
                        if at == 0 and len(seen[0]) >= after_tokens:
                            has_enough.set()
                except LoraplexError as error:
                    return type(error).__name__
                finally:
                    has_enough.set()
                return "whole"

            streams = [asyncio.create_task(read(at, adapter)) for at, adapter in enumerate(SERVED)]
            if after_tokens:
                await has_enough.wait()
            else:
                await asyncio.sleep(self._rng.uniform(0, MOST_LOAD_DELAY_S))
            await self._kill(self._stack.engines[-1], phase)
            await asyncio.to_thread(self._start)
            ends = await asyncio.gather(*streams)
        for adapter, tokens, expected, end in zip(SERVED, seen, self._expected, ends, strict=True):
            self._tally.num_streams[end] = self._tally.num_streams.get(end, 0) + 1
            if tokens != (expected if end == "whole" else expected[: len(tokens)]):
                self._wrong(phase, f"a stream of {adapter} that ended {end} drew {tokens}, undisturbed {expected}")

    async def _kill(self, engine: ServiceProcess, phase: str) -> None:
        """Kill one rank and wait until no process of the engine is left."""
        pids = [engine.pid, *followers_of(engine.pid)]
        rank, began_s = self._rng.randrange(self._degree), time.monotonic()
        if len(pids) != self._degree:
            raise AssertionError(f"{len(pids)} processes of {self._degree} ranks\n{engine.log()[-2000:]}")
        os.kill(pids[rank], signal.SIGKILL)
        while left := [pid for pid in pids if is_alive(pid)]:
            if time.monotonic() - began_s > 10 * GONE_S:
                raise AssertionError(f"{left} of {pids} are left, rank {rank} was killed\n{engine.log()[-2000:]}")
            await asyncio.sleep(0.005)
        took_s = time.monotonic() - began_s
        tally = self._tally
        tally.gone_s.append(round(took_s, 3))
        tally.num_kills[phase] = tally.num_kills.get(phase, 0) + 1
        tally.ranks[rank] = tally.ranks.get(rank, 0) + 1
        if took_s > GONE_S:
            self._wrong(phase, f"processes were left for {took_s:.2f} s after rank {rank} was killed")
        await asyncio.to_thread(engine.wait)

    async def _check_service(self) -> None:
        """Serve the base and all adapters, by a new engine if there is none."""
        if not self._stack.engines[-1].is_running:
            await asyncio.to_thread(self._start)
        async with self._stack.client() as client:
            drawn = await greedy_all(client, SERVED, CHECK_TOKENS)
        for adapter, tokens, expected in zip(SERVED, drawn, self._expected, strict=True):
            if tokens != expected[:CHECK_TOKENS]:
                self._wrong("restart", f"{adapter} drew {tokens}, before {expected[:CHECK_TOKENS]}")

    def _start(self) -> None:
        self._stack.start_engine()
        self._stack.wait_for_engine()

    def _wrong(self, phase: str, what: str) -> None:
        self._tally.wrong.append(f"{self._degree} ranks, {phase}: {what}")


@contextmanager
def _stack(directory: Path, degree: int) -> Iterator[Stack]:
    model = write_base_model(directory / "tiny", TinyBase())
    for name, recipe in RECIPES.items():
        write_adapter(directory / "adapters" / name, model, recipe)
    sizes = ("--pool-bytes", "2MiB", "--arena-bytes", "4MiB", "--tensor-parallel", str(degree))
    (directory / "stack").mkdir()
    with running_stack(directory / "stack", model, directory / "adapters", StackFlags(engine=sizes)) as stack:
        yield stack


def drawn_phases(num_decodes: int, rng: random.Random) -> list[str]:
    """Return the phases of a campaign in a drawn order."""
    phases = ["decode"] * num_decodes + list(OTHER_PHASES) * math.ceil(num_decodes / DECODES_PER_OTHERS)
    rng.shuffle(phases)
    return phases


def run_rank_kills(directory: Path, phases: Mapping[int, Sequence[str]], seed: int) -> RankKillTally:
    """Run a campaign; faults are in the tally.

    Args:
        directory: Empty; gets all files.
        phases: Ranks of an engine -> the phases in which one of them is killed.
        seed: Seed of everything random.
    """
    tally, began_s = RankKillTally(seed, list(phases)), time.monotonic()
    for degree, its_phases in phases.items():
        folder = directory / str(degree)
        folder.mkdir()
        rng = random.Random(f"{seed} {degree}")
        with _stack(folder, degree) as stack:
            asyncio.run(_Campaign(stack, degree, rng, tally).run(its_phases))
    tally.seconds = round(time.monotonic() - began_s, 1)
    return tally


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills during decode, divided among the degrees")
    parser.add_argument("--degrees", type=int, nargs="+", default=[2, 4], help="ranks of the engines")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    phases = {degree: drawn_phases(math.ceil(options.kills / len(options.degrees)), rng) for degree in options.degrees}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="loraplex-ranks-") as directory:
        tally = run_rank_kills(Path(directory), phases, options.seed)
    text = json.dumps({"commit": commit, **tally.times, **asdict(tally)}, indent=2)
    print(text)
    if options.results is not None:
        (options.results / f"rank-kills_{commit[:12]}_{options.seed}.json").write_text(text + "\n")
    return bool(tally.wrong)


if __name__ == "__main__":
    sys.exit(main())
