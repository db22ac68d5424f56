"""A whole stack with a tensor-parallel engine against PEFT: random adapters of every method, evicted, replaced and pushed.

``python -m support.rank_campaign --rounds 20`` runs any number of rounds and writes the results; the test suite runs some. A round
has a stack of its own: store, engine of several processes, gateway. Its pool holds few of the adapters. While requests run, adapters
are evicted from the engine, names move to other weights, and weights are pushed. PEFT is then forced along each output, with the
weights that the answer names: every token must be its choice, or a tie, and every probability its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import grpc
import numpy as np
import torch
from loraplex.v1 import engine_pb2, engine_pb2_grpc
from loraplex_client import AsyncClient, Chunk, Started
from loraplex_common.grpc_channel import open_channel
from safetensors.numpy import load_file
from support.campaign_adapters import METHODS, write_adapters
from support.generation import start
from support.oracle import MAX_LOGIT_ERROR, MAX_TIES, TIE_GAP, Oracle
from support.peft_methods import base_dir
from support.stack import Stack, StackFlags, running_stack

if TYPE_CHECKING:
    from support.campaign_adapters import AdapterOfMethod

BASE_NAMES: Final = ("llama", "qwen2", "odd")
"""The last has a vocabulary that no number of ranks divides, and one head of keys."""
SERVED_METHODS: Final = tuple(method for method in METHODS if method != "alora")
"""An activated adapter's output is compared by the campaign that knows where it begins; ranks take it as any other pair."""
NUM_LOGPROBS: Final = 5
MAX_PROMPT, MAX_OUTPUT = 30, 8
SIZES: Final = (
    "--pool-bytes",
    "160KiB",
    "--arena-bytes",
    "4MiB",
    "--max-num-seqs",
    "8",
    "--max-num-batched-tokens",
    "64",
)


@dataclass
class RankTally:
    """The results of a campaign.

    Attributes:
        seed: Seed of everything random.
        num_requests: Outputs that were compared.
        num_positions: Tokens that were compared.
        num_ties: How many of them PEFT could as well have drawn.
        num_changes: What was done to adapters meanwhile: what -> how often.
        logit_error: Largest error of a log probability, relative to the largest logit.
        by_method: Method, or ``base`` -> tokens that were compared.
        wrong: What went wrong.
    """

    seed: int
    num_rounds: int = 0
    num_requests: int = 0
    num_positions: int = 0
    num_ties: int = 0
    num_changes: dict[str, int] = field(default_factory=dict)
    logit_error: float = 0.0
    seconds: float = 0.0
    by_method: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether everything equals PEFT, as docs/testing.md defines it."""
        has_few_ties = self.num_ties <= max(1, MAX_TIES * self.num_positions)
        return not self.wrong and has_few_ties and self.logit_error < MAX_LOGIT_ERROR


class GroupFlags(NamedTuple):
    """An engine's ranks: how many, and how they divide adapters' pairs (``--adapter-split``)."""

    degree: int
    split: str = "auto"


class Round:
    """One stack and its adapters.

    Args:
        folder: Empty; for everything that is written.
        group: The engine's tensor-parallel ranks.
        rng: Source of everything random.
        tally: Gets the results.
    """

    def __init__(self, folder: Path, group: GroupFlags, rng: np.random.Generator, tally: RankTally) -> None:
        self._folder, self._group, self._rng, self._tally = folder, group, rng, tally
        self._base = str(rng.choice(BASE_NAMES))
        self._truths: dict[str, tuple[str, AdapterOfMethod]] = {}  # revision -> method, and what PEFT makes of it
        self._sets = [write_adapters(folder / "adapters" / name, self._base, rng) for name in ("first", "second")]

    def run(self, num_requests: int) -> None:
        """Serve random requests while adapters change, then compare each with PEFT."""
        group = ("--tensor-parallel", str(self._group.degree), "--adapter-split", self._group.split)
        flags = StackFlags(engine=(*group, *SIZES))
        logs = self._folder / "stack"
        logs.mkdir()
        with running_stack(logs, base_dir(self._base), self._folder / "adapters", flags) as stack:
            answers = asyncio.run(self._serve(stack, num_requests))
        base = Oracle(base_dir(self._base))
        for prompt, started, chunks in answers:
            method, truth = self._truths.get(started.adapter_revision, ("base", base))
            self._compare(method, truth, prompt, chunks)

    async def _serve(self, stack: Stack, num_requests: int) -> list[tuple[list[int], Started, list[Chunk]]]:
        vocab_size = json.loads((base_dir(self._base) / "config.json").read_text())["vocab_size"]
        async with stack.client() as client, open_channel(stack.engines[0].grpc) as channel:
            for method in SERVED_METHODS:
                await self._import(client, method, 0)
            changing = asyncio.create_task(self._change(client, engine_pb2_grpc.EngineServiceStub(channel)))
            gate = asyncio.Semaphore(8)

            async def one(number: int) -> tuple[list[int], Started, list[Chunk]]:
                name = (None, *SERVED_METHODS)[number % (len(SERVED_METHODS) + 1)]
                prompt = self._rng.integers(10, vocab_size, int(self._rng.integers(1, MAX_PROMPT))).tolist()
                async with gate:
                    stream = start(
                        client,
                        name,
                        int(self._rng.integers(1, MAX_OUTPUT + 1)),
                        prompt_token_ids=prompt,
                        logprobs=NUM_LOGPROBS,
                    )
                    events = [event async for event in stream]
                started = next(event for event in events if isinstance(event, Started))
                return prompt, started, [event for event in events if isinstance(event, Chunk)]

            answers = await asyncio.gather(*(one(number) for number in range(num_requests)))
            changing.cancel()
            await asyncio.gather(changing, return_exceptions=True)
            if changing.done() and not changing.cancelled() and changing.exception() is not None:
                raise changing.exception()  # type: ignore[misc]
            return answers

    async def _import(self, client: AsyncClient, method: str, which: int) -> None:
        folder = self._folder / "adapters" / ("first", "second")[which] / method
        result = await client.adapters.import_directory(method, folder)
        self._truths[result.revision.digest] = method, self._sets[which][method]

    async def _change(self, client: AsyncClient, engine: Any) -> None:
        """Evict, replace and push at random until cancelled."""
        while True:
            method, what = str(self._rng.choice(SERVED_METHODS)), str(self._rng.choice(["evict", "replace", "push"]))
            if what == "evict":
                await _evict_one(engine, self._rng)
            elif what == "replace":
                await self._import(client, method, int(self._rng.integers(2)))
            else:
                which = int(self._rng.integers(2))
                folder = self._folder / "adapters" / ("first", "second")[which] / method
                config = json.loads((folder / "adapter_config.json").read_text())
                result = await client.adapters.push(method, load_file(folder / "adapter_model.safetensors"), config)
                self._truths[result.revision.digest] = method, self._sets[which][method]
            self._tally.num_changes[what] = self._tally.num_changes.get(what, 0) + 1

    def _compare(self, method: str, truth: Oracle | AdapterOfMethod, prompt: list[int], chunks: list[Chunk]) -> None:
        tally = self._tally
        tally.num_requests += 1
        tokens = [*prompt, *(token for chunk in chunks for token in chunk.token_ids)]
        logits = truth.logits(tokens, None).astype(np.float64)
        reported = [position for chunk in chunks for position in chunk.logprobs]
        for at, position in enumerate(reported):
            row, token = logits[len(prompt) + at - 1], tokens[len(prompt) + at]
            tally.num_positions += 1
            tally.by_method[method] = tally.by_method.get(method, 0) + 1
            what = f"{self._base} {method} prompt {prompt} token {at}"
            gap = float(row.max() - row[token])
            if 0 < gap < TIE_GAP:
                tally.num_ties += 1
            elif gap:
                tally.wrong.append(f"{what}: drew {token}, PEFT {int(row.argmax())}, {gap:.2e} apart")
            true = row - np.logaddexp.reduce(row)
            error = max(abs(each.logprob - true[each.token_id]) for each in position.top) / np.abs(row).max()
            tally.logit_error = max(tally.logit_error, float(error))
            if not error < MAX_LOGIT_ERROR:
                tally.wrong.append(f"{what}: log probabilities are {error:.1e} off")


async def _evict_one(engine: Any, rng: np.random.Generator) -> None:
    held = (await engine.ListAdapters(engine_pb2.ListAdaptersRequest())).adapters
    if not held:
        return
    try:
        await engine.EvictAdapter(engine_pb2.EvictAdapterRequest(digest=held[int(rng.integers(len(held)))].digest))
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:  # it has left the engine meanwhile
            raise


def run_rank_campaign(
    directory: Path, *, group: GroupFlags, num_rounds: int, num_requests: int, seed: int
) -> RankTally:
    """Run rounds; faults are in the tally.

    Args:
        directory: Gets all files.
        group: Tensor-parallel ranks of the engines.
        num_rounds: Rounds, each with a stack and adapters of its own.
        num_requests: Requests of a round.
        seed: Seed of everything random.
    """
    torch.set_num_threads(1)
    tally, began_s = RankTally(seed), time.monotonic()
    for number in range(num_rounds):
        folder = directory / str(number)
        folder.mkdir()
        Round(folder, group, np.random.default_rng([seed, number]), tally).run(num_requests)
        shutil.rmtree(folder)
        tally.num_rounds += 1
    tally.seconds = round(time.monotonic() - began_s, 1)
    return tally


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--degree", type=int, default=2)
    parser.add_argument("--split", choices=("auto", "whole", "divided"), default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=60, help="requests of a round")
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory() as directory:
        tally = run_rank_campaign(
            Path(directory),
            group=GroupFlags(arguments.degree, arguments.split),
            num_rounds=arguments.rounds,
            num_requests=arguments.requests,
            seed=seed,
        )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    text = json.dumps(
        {"commit": commit, "degree": arguments.degree, "split": arguments.split, **asdict(tally)}, indent=2
    )
    print(text)
    if arguments.results is not None:
        (arguments.results / f"ranks_{commit[:12]}_{arguments.degree}_{arguments.split}_{seed}.json").write_text(
            text + "\n"
        )
    return 0 if tally.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
