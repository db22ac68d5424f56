"""Streams of every kind over two gateways while gateways are killed: each must end as an undisturbed stream does.

``python -m support.gateway_kills --rounds 100`` runs any number of rounds; the test suite runs a few.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_client import AsyncClient, Chunk, Finished, Started
from support.stack import Stack, StackFlags, assert_idle, running_stack
from support.stack_fixtures import import_all, write_tiny_world

if TYPE_CHECKING:
    from loraplex_client import Event
    from support.processes import ServiceProcess

NEW_TOKENS = 160
NUM_KINDS = 12
NUM_AT_ONCE = 8
FLAGS = StackFlags(gateway=("--drain-grace-s", "0.2"))


@dataclass
class Answer:
    """The content of a stream, without times and caches."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, int]] = field(default_factory=list)
    end: tuple[Any, ...] = ()
    revision: str = ""
    num_starts: int = 0

    def take(self, event: Event) -> None:
        """Add an event."""
        self.text += event.text
        self.token_ids += event.token_ids
        if isinstance(event, Started):
            self.num_starts += 1
            self.revision = event.adapter_revision
        elif isinstance(event, Chunk):
            self.logprobs += [(entry.chosen.token_id, len(entry.top)) for entry in event.logprobs]
        elif isinstance(event, Finished):
            usage = event.usage
            self.end = (event.finish_reason, event.stop_string, event.stop_token_id, usage.output_tokens)


@dataclass
class Tally:
    """The results of a campaign."""

    num_streams: int = 0
    num_resumes: int = 0
    num_kills: int = 0
    pauses_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


def make_kind(rng: random.Random, adapters: list[str]) -> dict[str, Any]:
    """Return the options of one kind of request; the same options give the same answer."""
    options: dict[str, Any] = {
        "prompt_token_ids": [rng.randrange(5, 250) for _ in range(rng.choice((1, 5, 60)))],
        "adapter": rng.choice([None, *adapters]),
        "max_new_tokens": rng.choice((1, 40, NEW_TOKENS)),
        "temperature": rng.choice((0.0, 0.0, 1.0)),
        "seed": rng.randrange(2**32),
        "ignore_eos": rng.random() < 0.7,
        "frequency_penalty": rng.choice((None, 0.5)),
        "logprobs": rng.choice((None, None, 2)),
        "stop": rng.choice((None, ["ab", "\ufffd\ufffd\ufffd\ufffd", " e"], ["never to be seen"])),
        "include_stop": rng.random() < 0.5,
        "skip_special_tokens": rng.random() < 0.5,
    }
    return {name: value for name, value in options.items() if value is not None}


class Campaign:
    """One stack with two gateways, and streams that are compared with their undisturbed answers."""

    def __init__(self, stack: Stack, rng: random.Random, tally: Tally) -> None:
        self._stack = stack
        self._rng = rng
        self._tally = tally
        self.gateways = [stack.gateway, stack.start_gateway()]
        self._kinds: list[dict[str, Any]] = []
        self._expected: list[Answer] = []
        self._is_over = False

    def client(self) -> AsyncClient:
        """Return a client of both gateways."""
        return AsyncClient([gateway.grpc for gateway in self.gateways], store_target=self._stack.store.grpc)

    async def run(self, num_rounds: int, *, gently: bool) -> None:
        """In each round, kill a gateway or ask it to end while streams run, and start it again on its ports."""
        adapters = sorted(import_all(self._stack))
        async with self.client() as client:
            self._kinds = [make_kind(self._rng, adapters) for _ in range(NUM_KINDS)]
            self._expected = [await self.answer(client, kind) for kind in self._kinds]
            readers = [asyncio.create_task(self._read(client)) for _ in range(NUM_AT_ONCE)]
            try:
                for n in range(num_rounds):
                    await self._lose(n % 2, gently=gently)
            finally:
                self._is_over = True
                await asyncio.gather(*readers)

    async def answer(self, client: AsyncClient, kind: dict[str, Any]) -> Answer:
        """Return the answer to a request."""
        answer, last_at = Answer(), time.monotonic()
        stream = client.generate(**kind, timeout=120)
        pause_s = 0.0
        async with stream:
            async for event in stream:
                pause_s, last_at = max(pause_s, time.monotonic() - last_at), time.monotonic()
                answer.take(event)
        self._tally.num_resumes += stream.num_resumes
        if stream.num_resumes:
            self._tally.pauses_s.append(pause_s)
        return answer

    async def _read(self, client: AsyncClient) -> None:
        while not self._is_over:
            n = self._rng.randrange(len(self._kinds))
            self._tally.num_streams += 1
            try:
                answer = await self.answer(client, self._kinds[n])
            except Exception as error:
                self._tally.errors[type(error).__name__] += 1
                self._tally.wrong.append(f"{self._kinds[n]}: {type(error).__name__}: {error}")
                continue
            if answer != self._expected[n]:
                self._tally.wrong.append(f"{self._kinds[n]}: {answer}, undisturbed {self._expected[n]}")

    async def _lose(self, index: int, *, gently: bool) -> None:
        """End a gateway that has streams and start it again."""
        lost: ServiceProcess = self.gateways[index]
        await asyncio.sleep(self._rng.uniform(0.05, 0.4))  # at any point of the streams
        if gently:
            assert await asyncio.to_thread(lost.stop) == 0
        else:
            await asyncio.to_thread(lost.kill)
        self._tally.num_kills += 1
        self.gateways[index] = await asyncio.to_thread(self._stack.start_gateway, port=lost.grpc.rpartition(":")[2])
        if index == 0:
            self._stack.gateway = self.gateways[0]


async def run_campaign(directory: Path, *, num_rounds: int, seed: int, gently: bool) -> Tally:
    """Run rounds over a stack of their own; the tally has what was wrong."""
    tally = Tally()
    with running_stack(directory, *write_tiny_world(directory), FLAGS) as stack:
        stack.start_engine()
        campaign = Campaign(stack, random.Random(seed), tally)
        try:
            await campaign.run(num_rounds, gently=gently)
            for engine in stack.engines:
                await assert_idle(engine)
        finally:
            campaign.gateways[1].stop()
    return tally


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--gently", action="store_true", help="SIGTERM with a short grace instead of SIGKILL")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        campaign = run_campaign(
            Path(directory), num_rounds=arguments.rounds, seed=arguments.seed, gently=arguments.gently
        )
        tally = asyncio.run(campaign)
    pauses = sorted(tally.pauses_s)
    print(
        f"seed {arguments.seed}: {tally.num_streams} streams, {tally.num_kills} gateways lost, {tally.num_resumes} resumes"
    )
    if pauses:
        print(f"longest pause of a resumed stream: median {pauses[len(pauses) // 2]:.2f} s, worst {pauses[-1]:.2f} s")
    print("\n".join([f"{len(tally.wrong)} wrong", *tally.wrong[:10]]))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
