"""Two stores on one Valkey, one of which is killed every few seconds while streams run: no request may fail.

``python -m support.replica_campaign --seconds 60`` (a part of ``make campaign``) runs as long as it is told; the test suite
runs a few seconds. Streams over two gateways draw from adapters that the engine is told to forget all the time, so that nearly
each of them needs a store, and must give the tokens that they gave before. An administrator imports new adapters beside them,
repeats a call that a kill has cut, and asks for each adapter at both gateways as soon as it is answered.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
from loraplex_client import AsyncClient
from loraplex_common.errors import LoraplexError
from loraplex_common.grpc_channel import open_channel
from support.adapters import Recipe, adapter_files
from support.generation import greedy
from support.stack import Stack, StackFlags, assert_idle, read_metrics, running_stack
from support.stack_fixtures import import_all, write_tiny_world
from support.store_rig import StoreClient, new_id

if TYPE_CHECKING:
    from support.processes import ServiceProcess

NUM_READERS: Final = 6
TOKENS: Final = 24
NEW_EVERY_S: Final = 0.5
ANSWER_S: Final = 20.0
"""Time within which a repeated administrator's call must be answered."""


@dataclass
class ReplicaTally:
    """The results of a campaign.

    Attributes:
        num_fetches: Images that stores have brought to the engine, as far as stores lived to tell.
        num_imports: Adapters that were imported, and used at once at both gateways.
        num_repeats: Calls of imports that a kill cut and that were repeated.
        attach_s: Time from each kill of the store that the engine was attached to, to its attachment at the other.
        slowest_s: Longest time of one stream.
        wrong: What went wrong.
    """

    seed: int
    seconds: float
    every_s: float
    num_kills: int = 0
    num_streams: int = 0
    num_fetches: int = 0
    num_imports: int = 0
    num_repeats: int = 0
    attach_s: list[float] = field(default_factory=list)
    slowest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class _Campaign:
    """Kills, readers and an administrator over one stack."""

    def __init__(self, stack: Stack, tally: ReplicaTally) -> None:
        self._stack = stack
        self._tally = tally
        self._rng = random.Random(tally.seed)
        self._gateways = [stack.gateway, stack.start_gateway()]
        self._expected: dict[str, list[int]] = {}
        self._is_over = asyncio.Event()

    @property
    def _any_store(self) -> str:
        return "ipv4:" + self._stack.store_target

    async def run(self) -> None:
        """Run until the time is over and all streams have ended."""
        adapters = sorted(import_all(self._stack))
        clients = [AsyncClient(each.grpc, store_target=self._any_store) for each in self._gateways]
        for adapter in adapters:
            self._expected[adapter] = await greedy(clients[0], adapter, TOKENS)
        work = [asyncio.create_task(self._read(clients[number % 2])) for number in range(NUM_READERS)]
        work += [asyncio.create_task(self._forget(clients[0])), asyncio.create_task(self._administrate(clients))]
        try:
            await self._kill()
        finally:
            self._is_over.set()
            await asyncio.gather(*work)
            for client in clients:
                await client.close()
            self._gateways[1].stop()
        for store in (self._stack.store, *self._stack.more_stores):
            self._tally.num_fetches += round(read_metrics(store).get("loraplex_store_fetch_total", 0))

    async def _kill(self) -> None:
        began_at = time.monotonic()
        for number in range(1, int(self._tally.seconds / self._tally.every_s) + 1):
            # By the clock: a store needs some seconds to start again.
            due_at = began_at + self._tally.every_s * (number - self._rng.uniform(0, 0.2))
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            stores = (self._stack.store, self._stack.more_stores[0])
            # The one that the engine is attached to, mostly: that is where a kill is felt.
            attached = [read_metrics(each)["loraplex_store_engines"] for each in stores]
            index = attached.index(max(attached)) if self._rng.random() < 0.8 else self._rng.randrange(2)
            self._tally.num_fetches += round(read_metrics(stores[index]).get("loraplex_store_fetch_total", 0))
            began = time.monotonic()
            await asyncio.to_thread(stores[index].kill)
            self._tally.num_kills += 1
            if attached[index]:
                await self._until_attached(stores[1 - index], began)
            again = partial(self._stack.restart_another_store, 0) if index else self._stack.restart_store
            await asyncio.to_thread(again)

    async def _until_attached(self, store: ServiceProcess, began: float) -> None:
        while not (await asyncio.to_thread(read_metrics, store))["loraplex_store_engines"]:
            if time.monotonic() - began > ANSWER_S:
                self._tally.wrong.append("the engine has not attached to the other store")
                return
            await asyncio.sleep(0.02)
        self._tally.attach_s.append(round(time.monotonic() - began, 3))

    async def _read(self, client: AsyncClient) -> None:
        while not self._is_over.is_set():
            adapter = self._rng.choice(sorted(self._expected))
            began = time.monotonic()
            self._tally.num_streams += 1
            try:
                tokens = await greedy(client, adapter, TOKENS)
            except LoraplexError as error:
                self._tally.wrong.append(f"{adapter}: {type(error).__name__}: {error}")
                continue
            if tokens != self._expected[adapter]:
                self._tally.wrong.append(f"{adapter}: {tokens}, undisturbed {self._expected[adapter]}")
            self._tally.slowest_s = max(self._tally.slowest_s, round(time.monotonic() - began, 3))

    async def _forget(self, client: AsyncClient) -> None:
        """Have the engine forget adapters; a hint that is lost with a store is no failure."""
        while not self._is_over.is_set():
            await asyncio.sleep(0.05)
            try:
                await client.adapters.evict(self._rng.choice(sorted(self._expected)))
            except LoraplexError:
                continue

    async def _administrate(self, clients: list[AsyncClient]) -> None:
        async with open_channel(self._any_store) as channel:
            while not self._is_over.is_set():
                name = f"new-{self._tally.num_imports}"
                await self._import(StoreClient(channel=channel), name)
                tokens = []
                for client in clients:
                    try:
                        tokens.append(await greedy(client, name, 2))
                    except LoraplexError as error:
                        self._tally.wrong.append(f"{name} after its import: {type(error).__name__}: {error}")
                if any(each != tokens[0] for each in tokens):
                    self._tally.wrong.append(f"{name}: two gateways gave {tokens}")
                self._tally.num_imports += 1
                await asyncio.sleep(NEW_EVERY_S)

    async def _import(self, store: StoreClient, name: str) -> None:
        files = adapter_files(self._stack.model, Recipe(rank=2, seed=1000 + self._tally.num_imports))
        request_id, give_up_at = new_id(), time.monotonic() + ANSWER_S
        while True:
            try:
                answer = await store.upload(name, files, request_id=request_id)
            except (LoraplexError, grpc.aio.AioRpcError, asyncio.CancelledError) as error:
                if _is_cancelled():
                    raise  # else gRPC has cancelled a call whose store died while it was written to
                if time.monotonic() > give_up_at:
                    self._tally.wrong.append(f"{name} cannot be imported: {error!r}")
                    return
                self._tally.num_repeats += 1
                await asyncio.sleep(0.05)
                continue
            if answer.visibility.late_gateways:
                self._tally.wrong.append(f"{name} was answered before {answer.visibility.late_gateways}")
            return


def _is_cancelled() -> bool:
    """Tell whether the running task itself is to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _run(stack: Stack, tally: ReplicaTally) -> None:
    await _Campaign(stack, tally).run()
    for engine in stack.engines:
        await assert_idle(engine)


def run_replica_campaign(directory: Path, *, seconds: float, every_s: float, seed: int) -> ReplicaTally:
    """Run a campaign in an empty directory; the tally has what was wrong."""
    tally = ReplicaTally(seed=seed, seconds=seconds, every_s=every_s)
    with running_stack(directory, *write_tiny_world(directory), StackFlags(num_stores=2)) as stack:
        asyncio.run(_run(stack, tally))
    return tally


def main() -> None:
    """Run a campaign and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every-s", type=float, default=5.0, help="time between two kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="loraplex-replicas-") as directory:
        tally = run_replica_campaign(
            Path(directory), seconds=options.seconds, every_s=options.every_s, seed=options.seed
        )
    text = json.dumps({"commit": commit, **asdict(tally)}, indent=2)
    print(text)
    if options.results is not None:
        (options.results / f"replicas_{commit[:12]}_{options.seed}.json").write_text(text + "\n")
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
