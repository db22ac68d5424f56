"""A thousand random operations on a stack too small for them: nothing is left behind, and no token is ever wrong."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_client import AsyncClient, AsyncGenerateStream, Started
from loraplex_common.errors import AdapterInUseError, AdapterNotFoundError, CancelledRequestError
from loraplex_common.grpc_channel import open_channel
from support.adapters import Recipe, write_adapter
from support.backend import kibibytes, served_base
from support.base_models import write_base_model
from support.generation import greedy, start
from support.stack import Stack, StackFlags, assert_idle, read_metrics, running_stack

if TYPE_CHECKING:
    from support.processes import ServiceProcess

pytestmark = pytest.mark.integration

SEED = 20240
NUM_OPERATIONS = 1000
NUM_NAMES = 6
NUM_VARIANTS = 2
MAX_STREAMS = 12
NEW_TOKENS = 40
PROMPTS = ((5, 6, 7), tuple(range(40, 60)), tuple(range(100, 150)))
WEIGHTS = {"submit": 10, "cancel": 4, "reimport": 2, "delete": 1, "evict": 2, "drop": 1}


def open_files(process: ServiceProcess) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def children(process: ServiceProcess) -> list[str]:
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


class Chaos:
    """Runs random operations and remembers what every stream should say."""

    def __init__(self, stack: Stack, client: AsyncClient, seed: int) -> None:
        self.stack = stack
        self.client = client
        self.rng = random.Random(seed)
        self.expected: dict[tuple[str, int], list[int]] = {}
        self.counts: Counter[str] = Counter()
        self.readers: dict[asyncio.Task[None], AsyncGenerateStream] = {}

    def directory(self, name: int, variant: int) -> Path:
        return self.stack.import_root / f"n{name}-v{variant}"

    async def prepare(self) -> None:
        """Write and import every variant, and record what each says alone."""
        for name in range(NUM_NAMES):
            for variant in range(NUM_VARIANTS):
                recipe = Recipe(rank=4 + 2 * name, seed=10 * name + variant)
                directory = write_adapter(self.directory(name, variant), self.stack.model, recipe)
                revision = (await self.client.adapters.import_directory(f"n{name}", directory)).revision.digest
                for index, prompt in enumerate(PROMPTS):
                    alone = await greedy(self.client, f"n{name}@{revision}", NEW_TOKENS, prompt_token_ids=prompt)
                    self.expected[revision, index] = alone
        for index, prompt in enumerate(PROMPTS):
            self.expected["", index] = await greedy(self.client, None, NEW_TOKENS, prompt_token_ids=prompt)

    async def run(self) -> None:
        """Do the operations, then wait for all streams."""
        for _ in range(NUM_OPERATIONS):
            (operation,) = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
            await getattr(self, operation)()
            self.counts[operation] += 1
            while len(self.readers) >= MAX_STREAMS:
                await asyncio.wait(self.readers, return_when=asyncio.FIRST_COMPLETED)
                self.reap()
        while self.readers:
            await asyncio.wait(self.readers, return_when=asyncio.FIRST_COMPLETED)
            self.reap()

    def reap(self) -> None:
        for reader in [reader for reader in self.readers if reader.done()]:
            del self.readers[reader]
            reader.result()

    def name(self) -> str:
        return f"n{self.rng.randrange(NUM_NAMES)}"

    async def submit(self) -> None:
        adapter = self.name() if self.rng.random() < 0.9 else None
        index = self.rng.randrange(len(PROMPTS))
        stream = start(self.client, adapter, NEW_TOKENS, prompt_token_ids=PROMPTS[index])
        self.readers[asyncio.create_task(self.read(stream, index))] = stream
        await asyncio.sleep(0)

    async def read(self, stream: AsyncGenerateStream, index: int) -> None:
        """Read a stream to its end, comparing each token as it comes."""
        expected: list[int] = []
        position = 0
        try:
            async for event in stream:
                if isinstance(event, Started):
                    expected = self.expected[event.adapter_revision, index]
                tokens = list(event.token_ids)
                assert tokens == expected[position : position + len(tokens)], f"wrong tokens at {position}: {tokens}"
                position += len(tokens)
        except AdapterNotFoundError:
            self.counts["not found"] += 1
            return
        except (asyncio.CancelledError, CancelledRequestError):  # by `cancel`, before or after it was sent
            self.counts["cancelled"] += 1
        self.counts["finished" if position == NEW_TOKENS else "cut"] += 1

    async def cancel(self) -> None:
        if self.readers:
            await self.rng.choice(list(self.readers.values())).aclose()

    async def reimport(self) -> None:
        name = self.rng.randrange(NUM_NAMES)
        directory = self.directory(name, self.rng.randrange(NUM_VARIANTS))
        await self.client.adapters.import_directory(f"n{name}", directory)

    async def delete(self) -> None:
        try:
            await self.client.adapters.delete(self.name(), force=self.rng.random() < 0.5)
        except (AdapterNotFoundError, AdapterInUseError) as error:
            self.counts[type(error).__name__] += 1

    async def evict(self) -> None:
        """Take a random adapter off the device."""
        revision, _ = self.rng.choice([key for key in self.expected if key[0]])
        async with open_channel(self.stack.engines[0].grpc) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            try:
                await stub.EvictAdapter(engine_pb2.EvictAdapterRequest(digest=revision))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                self.counts["nothing to evict"] += 1

    async def drop(self) -> None:
        """Tell the engine by way of the store that an adapter is not wanted."""
        try:
            await self.client.adapters.evict(self.name())
        except AdapterNotFoundError:
            self.counts["nothing to drop"] += 1


async def test_a_thousand_random_operations_leave_nothing_behind_and_no_token_is_wrong(tmp_path: Path) -> None:
    model = write_base_model(tmp_path / "tiny", served_base())
    (tmp_path / "adapters").mkdir()
    # 8 KiB pages; the twelve adapters take about 9 to 29 each, far more than the pool or the arena has.
    small = ("--pool-bytes", kibibytes(360), "--arena-bytes", kibibytes(480), "--max-num-seqs", "8")
    flags = StackFlags(engine=(*small, "--growth-quantile", "0"))
    with running_stack(tmp_path, model, tmp_path / "adapters", flags) as stack:
        client = stack.client()
        chaos = Chaos(stack, client, SEED)
        await chaos.prepare()
        files = {process.log_path: open_files(process) for process in (stack.engines[0], stack.store, stack.gateway)}

        await chaos.run()

        await client.close()
        await assert_idle(stack.engines[0])
        metrics = read_metrics(stack.engines[0])
        for process in (stack.engines[0], stack.store, stack.gateway):
            assert not children(process)
            assert open_files(process) <= files[process.log_path] + 8
    assert metrics["loraplex_engine_leases"] == 0
    assert metrics["loraplex_engine_adapter_evictions_total"] > 10
    assert metrics["vllm:num_preemptions_total"] > 10
    assert chaos.counts["finished"] > 100, chaos.counts
    assert chaos.counts["cut"] > 10, chaos.counts
