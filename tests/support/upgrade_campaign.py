"""A stack of an earlier commit whose every part is replaced by this checkout's, one after another, while streams run.

``python -m support.upgrade_campaign --streams 50`` (a part of ``make campaign``) takes the code of `PREVIOUS` out of the history
and starts it; the test suite runs few streams. No stream may be lost, and each must give the tokens that the earlier version gave
undisturbed. Before the replacement this checkout's gateway serves with the earlier engines, after the engines' the earlier gateways
with this checkout's: both skews answer. Valkey's data is the earlier version's all along.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_client import AsyncClient
from loraplex_common.errors import LoraplexError
from support.generation import PROMPT, greedy
from support.stack import PACKAGES, Stack, StackFlags, assert_idle, running_stack
from support.stack_fixtures import import_all, write_tiny_world
from support.waiting import eventually

if TYPE_CHECKING:
    from support.processes import ServiceProcess

PREVIOUS: Final = "40f2dbc96421ec13b21508fa67544ff8085780ec"
"""The previous version, until there is a tag."""
ROOT: Final = Path(__file__).parents[2]
TOKENS: Final = 160
FLAGS: Final = StackFlags(gateway=("--drain-grace-s", "0.5"))


@dataclass
class UpgradeTally:
    """The results of a campaign.

    Attributes:
        num_streams: Streams that ran while parts were replaced.
        num_resumes: Streams' continuations through another gateway.
        streams_during: Part that was being replaced -> streams that ended meanwhile.
        skewed: Requests that each pair of different versions answered: ``gateway/engine``.
        wrong: What went wrong.
    """

    previous: str
    num_at_once: int
    num_streams: int = 0
    num_resumes: int = 0
    streams_during: dict[str, int] = field(default_factory=dict)
    skewed: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def has_history(commit: str = PREVIOUS) -> bool:
    """Tell whether this checkout's history has a commit: shallow clones have not."""
    asked = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True)
    return asked.returncode == 0


def take_out(commit: str, directory: Path) -> Path:
    """Write the packages of a commit to a directory, and return it.

    Raises:
        CalledProcessError: If the history does not have the commit.
    """
    made = subprocess.run(
        ["git", "archive", "--format=tar", commit, *PACKAGES], cwd=ROOT, capture_output=True, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        archive.extractall(directory, filter="data")
    return directory


class _Upgrade:
    """Readers over two gateways, and the replacement of all processes behind them."""

    def __init__(self, stack: Stack, tally: UpgradeTally) -> None:
        self._stack, self._tally = stack, tally
        self.gateways = [stack.gateway, stack.start_gateway()]
        self._expected: dict[str | None, list[int]] = {}
        self._is_over = False

    def _client(self, *gateways: ServiceProcess) -> AsyncClient:
        return AsyncClient([each.grpc for each in gateways], store_target=self._stack.store.grpc)

    async def run(self) -> None:
        """Replace all parts and let the last streams end."""
        adapters: list[str | None] = [None, *sorted(import_all(self._stack))]
        async with self._client(*self.gateways) as client:
            self._expected = {each: await greedy(client, each, TOKENS) for each in adapters}
        readers = [asyncio.create_task(self._read(number)) for number in range(self._tally.num_at_once)]
        try:
            await self._replace()
        finally:
            self._is_over = True
            await asyncio.gather(*readers)

    async def _replace(self) -> None:
        stack, old = self._stack, self._stack.flags
        new = replace(old, checkout=None)
        await self._during("start")
        stack.flags = new
        ahead = await asyncio.to_thread(stack.start_gateway)
        await self._ask("new/old", ahead)
        await self._end(ahead)
        await self._end(stack.store)
        await asyncio.to_thread(stack.restart_store)
        await self._during("store")
        for number, engine in enumerate(list(stack.engines)):
            await asyncio.to_thread(stack.start_engine)
            await self._end(engine)
            await self._during(f"engine {number}")
        await self._ask("old/new", self.gateways[0])
        for number, gateway in enumerate(self.gateways):
            await self._end(gateway)
            port = gateway.grpc.rpartition(":")[2]
            self.gateways[number] = await asyncio.to_thread(stack.start_gateway, port=port)
            await self._during(f"gateway {number}")
        stack.gateway = self.gateways[0]

    async def _end(self, process: ServiceProcess) -> None:
        if (status := await asyncio.to_thread(process.stop)) != 0:
            self._tally.wrong.append(f"{process.log_path.stem} ended with {status}: {process.log()[-1000:]}")

    async def _during(self, part: str) -> None:
        """Let as many streams end as run at once, so that each part serves some before the next goes."""
        before = self._tally.num_streams

        async def have_ended() -> bool:
            return self._tally.num_streams >= before + self._tally.num_at_once

        await eventually(have_ended, timeout_s=300.0)
        self._tally.streams_during[part] = self._tally.num_streams - before

    async def _ask(self, pair: str, gateway: ServiceProcess) -> None:
        async with self._client(gateway) as client:
            for adapter in self._expected:
                if await self._is_right(client, adapter, pair):
                    self._tally.skewed[pair] = self._tally.skewed.get(pair, 0) + 1

    async def _read(self, number: int) -> None:
        adapters = list(self._expected)
        async with self._client(*self.gateways) as client:
            while not self._is_over:
                await self._is_right(client, adapters[number % len(adapters)], f"reader {number}")
                number += 1
                self._tally.num_streams += 1

    async def _is_right(self, client: AsyncClient, adapter: str | None, asker: str) -> bool:
        tokens: list[int] = []
        stream = client.generate(
            prompt_token_ids=PROMPT,
            adapter=adapter,
            temperature=0.0,
            max_new_tokens=TOKENS,
            ignore_eos=True,
            timeout=240,
        )
        try:
            async for event in stream:
                tokens += event.token_ids
        except LoraplexError as error:
            self._tally.wrong.append(f"{asker}, {adapter}: {type(error).__name__}: {error}")
            return False
        self._tally.num_resumes += stream.num_resumes
        if tokens != self._expected[adapter]:
            self._tally.wrong.append(f"{asker}, {adapter}: {tokens}, undisturbed {self._expected[adapter]}")
        return tokens == self._expected[adapter]


async def _run(stack: Stack, tally: UpgradeTally) -> None:
    upgrade = _Upgrade(stack, tally)
    try:
        await upgrade.run()
    finally:
        for gateway in upgrade.gateways[1:]:
            gateway.stop()
    for engine in stack.engines:
        if engine.is_running:
            await assert_idle(engine)


def run_upgrade(directory: Path, *, num_at_once: int, commit: str = PREVIOUS) -> UpgradeTally:
    """Replace a stack of a commit by this checkout's, in an empty directory; the tally has what was wrong."""
    tally = UpgradeTally(previous=commit, num_at_once=num_at_once)
    flags = replace(FLAGS, checkout=take_out(commit, directory / "previous"))
    world = directory / "world"
    with running_stack(directory, *write_tiny_world(world), flags) as stack:
        stack.start_engine()
        asyncio.run(_run(stack, tally))
    return tally


def main() -> None:
    """Run a campaign and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=50, help="how many run at once")
    parser.add_argument("--previous", default=PREVIOUS, metavar="COMMIT", help="the version that is replaced")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="loraplex-upgrade-") as directory:
        tally = run_upgrade(Path(directory), num_at_once=options.streams, commit=options.previous)
    text = json.dumps({"commit": commit, **asdict(tally)}, indent=2)
    print(text)
    if options.results is not None:
        (options.results / f"upgrade_{commit[:12]}.json").write_text(text + "\n")
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
