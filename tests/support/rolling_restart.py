"""Gateways behind a real proxy restarted one after another while streams of every kind run: each ends as an undisturbed one does.

``python -m support.rolling_restart --streams 200`` (a part of ``make campaign``) does so behind HAProxy and Envoy; the test suite
runs few streams. The proxy has its file of deploy/proxies, and clients know nothing but the proxy. A gateway that ends lets its
health check turn first, then cuts its streams after a short grace, so that clients have to resume them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraplex_client import AsyncClient
from loraplex_common.errors import LoraplexError
from support.backend import kibibytes
from support.gateway_kills import Answer, make_kind
from support.proxies import Backend, running_proxy
from support.stack import Stack, StackFlags, assert_idle, read_metrics, running_stack
from support.stack_fixtures import import_all, write_tiny_world
from support.waiting import eventually

if TYPE_CHECKING:
    from support.processes import ServiceProcess

BEHIND: Final = ("haproxy", "envoy")
NUM_KINDS: Final = 12
SHORT: Final = 5
LONG: Final = 400
"""Tokens of most streams, more than a gateway that ends waits for."""
TIMEOUT_S: Final = 300.0
BATCH: Final = ("--max-num-seqs", "256", "--max-num-batched-tokens", "512")  # all streams at once
# The first is longer than the proxies' interval of checks.
FLAGS: Final = StackFlags(
    gateway=("--drain-settle-s", "0.7", "--drain-grace-s", "0.1"),
    engine=("--pool-bytes", kibibytes(65536), "--arena-bytes", kibibytes(8192), *BATCH),
)
SERVED: Final = "loraplex_gateway_requests_total"


@dataclass
class RestartTally:
    """The results of a campaign.

    Attributes:
        proxy: What clients talked to.
        num_at_once: Streams at any time.
        num_tokens: Tokens of three of four streams.
        num_streams: Streams that ran while gateways were restarted.
        num_resumes: Streams' continuations through another call.
        num_restarts: Gateways that ended and were started again.
        served: Requests that each restarted gateway has served since.
        pauses_s: The longest silence of each resumed stream; of these the median and the longest.
        seconds: Wall time of the restarts.
        wrong: What went wrong.
    """

    proxy: str
    seed: int
    num_at_once: int
    num_tokens: int = LONG
    num_streams: int = 0
    num_resumes: int = 0
    num_restarts: int = 0
    served: list[int] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what is written down."""
        pauses = sorted(self.pauses_s) or [0.0]
        short = {"median": round(pauses[len(pauses) // 2], 3), "longest": round(pauses[-1], 3)}
        return asdict(self) | {"pauses_s": short, "seconds": round(self.seconds, 1)}


def behind(gateway: ServiceProcess) -> Backend:
    """Return where a proxy finds a gateway."""
    return Backend(grpc=gateway.grpc, http=gateway.addresses["http"])


class RollingRestart:
    """Readers that know only a proxy, and the restarts behind it.

    Args:
        stack: The services.
        gateways: All gateways; each is replaced in this list.
        target: The proxy.
        tally: Gets the results.
    """

    def __init__(self, stack: Stack, gateways: list[ServiceProcess], target: str, tally: RestartTally) -> None:
        self._stack, self._gateways, self._target, self._tally = stack, gateways, target, tally
        self._expected: list[tuple[dict[str, Any], Answer]] = []
        self._is_over = False

    async def run(self, adapters: list[str]) -> None:
        """Restart each gateway once and let the last streams end."""
        rng = random.Random(self._tally.seed)
        kinds = [make_kind(rng, adapters) | self._length(number) for number in range(NUM_KINDS)]
        async with AsyncClient(self._target, store_target=self._stack.store.grpc) as client:
            answers = await asyncio.gather(*(self._answer(client, kind) for kind in kinds))
            self._expected = list(zip(kinds, answers, strict=True))
        readers = [asyncio.create_task(self._read(number)) for number in range(self._tally.num_at_once)]
        started_at = time.monotonic()
        try:
            await self._some_streams_end()
            for index in range(len(self._gateways)):
                await self._restart(index)
        finally:
            self._is_over = True
            await asyncio.gather(*readers)
        self._tally.seconds = time.monotonic() - started_at

    def _length(self, number: int) -> dict[str, Any]:
        return {"max_new_tokens": self._tally.num_tokens if number % 4 else SHORT, "ignore_eos": True}

    async def _restart(self, index: int) -> None:
        old = self._gateways[index]
        if (status := await asyncio.to_thread(old.stop)) != 0:
            self._tally.wrong.append(f"{old.log_path.stem} ended with {status}: {old.log()[-1000:]}")
        ports = [old.addresses[name].rpartition(":")[2] for name in ("grpc", "http")]
        new = await asyncio.to_thread(self._stack.start_gateway, "--http-port", ports[1], port=ports[0])
        self._gateways[index] = new
        self._tally.num_restarts += 1
        await eventually(lambda: self._has_served(new), timeout_s=TIMEOUT_S, what="the new gateway in service")
        await self._some_streams_end()
        self._tally.served.append(await self._has_served(new))

    async def _has_served(self, gateway: ServiceProcess) -> int:
        return round((await asyncio.to_thread(read_metrics, gateway)).get(SERVED, 0))

    async def _some_streams_end(self) -> None:
        """Return once a quarter of the streams has ended and others have taken their place."""
        goal = self._tally.num_streams + self._tally.num_at_once // 4
        await eventually(lambda: self._tally.num_streams >= goal, timeout_s=TIMEOUT_S, what="streams ended")

    async def _read(self, number: int) -> None:
        async with AsyncClient(self._target, store_target=self._stack.store.grpc) as client:
            while not self._is_over:
                kind, expected = self._expected[number % NUM_KINDS]
                number += 1
                try:
                    answer = await self._answer(client, kind)
                except LoraplexError as error:
                    self._tally.wrong.append(f"{kind}: {type(error).__name__}: {error}")
                else:
                    if answer != expected:
                        self._tally.wrong.append(f"{kind}: {answer}, undisturbed {expected}")
                self._tally.num_streams += 1

    async def _answer(self, client: AsyncClient, kind: dict[str, Any]) -> Answer:
        answer, last_at, pause_s = Answer(), time.monotonic(), 0.0
        stream = client.generate(**kind, timeout=TIMEOUT_S)
        async for event in stream:
            pause_s, last_at = max(pause_s, time.monotonic() - last_at), time.monotonic()
            answer.take(event)
        self._tally.num_resumes += stream.num_resumes
        if stream.num_resumes:
            self._tally.pauses_s.append(pause_s)
        return answer


async def restart_behind(stack: Stack, directory: Path, tally: RestartTally) -> None:
    """Restart a stack's gateway and another one behind a proxy.

    Args:
        stack: Has all adapters, and `FLAGS` among its flags.
        directory: For the proxy's file and log.
        tally: What to run; gets the results.
    """
    gateways = [stack.gateway, await asyncio.to_thread(stack.start_gateway)]
    try:
        async with running_proxy(tally.proxy, directory, [behind(gateway) for gateway in gateways]) as proxy:
            adapters = sorted(path.name for path in stack.import_root.iterdir())
            await RollingRestart(stack, gateways, proxy.grpc, tally).run(adapters)
        for engine in stack.engines:
            await assert_idle(engine)
    finally:
        stack.gateway = gateways[0]
        gateways[1].stop()


def main() -> None:
    """Run a campaign and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="how many run at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    tallies = []
    with tempfile.TemporaryDirectory(prefix="loraplex-restarts-") as name:
        directory = Path(name)
        with running_stack(directory, *write_tiny_world(directory), FLAGS) as stack:
            import_all(stack)
            for kind in BEHIND:
                tallies.append(RestartTally(proxy=kind, seed=options.seed, num_at_once=options.streams))
                asyncio.run(restart_behind(stack, directory, tallies[-1]))
    text = json.dumps({"commit": commit, "behind": [tally.to_json() for tally in tallies]}, indent=2)
    print(text)
    if options.results is not None:
        (options.results / f"rolling-restart_{commit[:12]}_{options.seed}.json").write_text(text + "\n")
    sys.exit(any(tally.wrong for tally in tallies))


if __name__ == "__main__":
    main()
