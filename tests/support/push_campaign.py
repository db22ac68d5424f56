"""A trainer that pushes a changing adapter under streams, on a whole stack, against PEFT.

``python -m support.push_campaign --pushes 200 --streams 50`` (a part of ``make campaign``) runs any number of pushes; the test
suite runs a few. Streams of a few prompts, so that prefixes repeat, run all the time with whatever ``policy`` means when they
begin. PEFT, with the tensors of exactly the revision that a stream reports, is forced along its output: every token must be
its choice, or a tie (docs/testing.md). No stream may report an older revision than the push that was acknowledged when it
began, and what store, Valkey and engine hold must not grow with the number of pushes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from loraplex_client import Chunk, Started
from loraplex_common.valkey import connect
from peft import set_peft_model_state_dict
from support.adapters import Recipe, write_adapter
from support.backend import served_base
from support.base_models import TinyBase, write_base_model
from support.oracle import MAX_TIES, Comparison, Oracle
from support.pushes import tensors_of
from support.stack import Stack, StackFlags, read_metrics, running_stack

if TYPE_CHECKING:
    from loraplex_client import AsyncClient

NAME: Final = "policy"
KEPT: Final = 2
STORE_FLAGS: Final = ("--keep-pushed-revisions", str(KEPT), "--gc-grace-s", "0.2", "--gc-interval-s", "0.1")
PROMPT_TOKENS, OUTPUT_TOKENS = 40, 12
NUM_PROMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Stream:
    """A finished stream.

    Attributes:
        least: Number of the newest push that was acknowledged when it began.
    """

    revision: str
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    least: int


@dataclass
class PushTally:
    """The results of a campaign.

    Attributes:
        num_positions: Tokens that were compared.
        num_ties: How many of them PEFT could as well have drawn.
        num_revisions: Revisions that streams reported.
        num_late: Pushes whose labels moved before the engine had the revision.
        num_overlaps: Streams that ended with an older revision than the newest one.
        push_p50_s: Median time from a push's first byte to its answer.
        grown_bytes: What the store's memory grew by in the second half.
        num_blobs: Weights in Valkey when all is over.
        num_held: Images that the engine holds then.
        wrong: What went wrong.
    """

    seed: int
    num_pushes: int = 0
    num_streams: int = 0
    num_positions: int = 0
    num_ties: int = 0
    num_revisions: int = 0
    num_late: int = 0
    num_overlaps: int = 0
    push_p50_s: float = 0.0
    grown_bytes: int = 0
    num_blobs: int = 0
    num_held: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing went wrong."""
        return not self.wrong and self.num_ties <= MAX_TIES * max(1, self.num_positions)


class _Loop:
    """The trainer and its readers."""

    def __init__(self, client: AsyncClient, base: Path, seed: int) -> None:
        self._client = client
        self._base = base
        self._seed = seed
        rng = np.random.default_rng(seed)
        self._prompts = [tuple(map(int, rng.integers(5, 200, PROMPT_TOKENS))) for _ in range(NUM_PROMPTS)]
        self.revisions: list[str] = []  # by number of the push
        self.streams: list[Stream] = []
        self.num_late = self.num_overlaps = 0
        self.push_s: list[float] = []

    def tensors(self, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what one push sends."""
        return tensors_of(self._seed + number, self._base, rank=4)

    async def push(self, number: int) -> None:
        """Push the next revision after the last one."""
        expected = self.revisions[-1] if self.revisions else ""
        began = time.monotonic()
        result = await self._client.adapters.push(NAME, *self.tensors(number), expected=expected)
        self.push_s.append(time.monotonic() - began)
        self.revisions.append(result.revision.digest)
        self.num_late += bool(result.late_engines)

    async def read(self, number: int, until: asyncio.Event) -> None:
        """Run streams one after another."""
        while not until.is_set():
            prompt = self._prompts[number % NUM_PROMPTS]
            least, revision = len(self.revisions) - 1, ""
            tokens: list[int] = []
            options: dict[str, Any] = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
            async for event in self._client.generate(prompt_token_ids=prompt, adapter=NAME, **options):
                if isinstance(event, Started):
                    revision = event.adapter_revision
                elif isinstance(event, Chunk):
                    tokens += event.token_ids
            self.streams.append(Stream(revision, prompt, tuple(tokens), least))
            self.num_overlaps += revision != self.revisions[-1]


async def _run(stack: Stack, base: Path, tally: PushTally, num_pushes: int, num_streams: int) -> _Loop:
    async with stack.client() as client:
        loop, is_over = _Loop(client, base, tally.seed), asyncio.Event()
        await loop.push(0)
        readers = [asyncio.create_task(loop.read(number, is_over)) for number in range(num_streams)]
        half_bytes = 0.0
        for number in range(1, num_pushes):
            seen = len(loop.streams)
            await loop.push(number)
            while not any(stream.least >= number for stream in loop.streams[seen:]):  # each revision is used
                await asyncio.sleep(0.005)
                _raise_failed(readers)
            if number == num_pushes // 2:
                half_bytes = read_metrics(stack.store)["process_resident_memory_bytes"]
        is_over.set()
        await asyncio.gather(*readers)
        tally.grown_bytes = round(read_metrics(stack.store)["process_resident_memory_bytes"] - half_bytes)
        await _count_what_is_left(stack, tally)
    return loop


def _raise_failed(readers: list[asyncio.Task[None]]) -> None:
    for reader in readers:
        if reader.done():
            reader.result()


async def _count_what_is_left(stack: Stack, tally: PushTally) -> None:
    """Count weights and images once the collector is done; more than are kept is wrong."""
    valkey = connect(stack.valkey.url)
    deadline = time.monotonic() + 20
    while True:
        tally.num_blobs = len(await valkey.keys("a:*:m"))
        (engine,) = await valkey.keys("loraplex:store:held:*")
        tally.num_held = await valkey.hlen(engine)
        if tally.num_blobs <= KEPT + 1 and tally.num_held <= KEPT + 1:
            break
        if time.monotonic() > deadline:
            tally.wrong.append(f"{tally.num_blobs} blobs and {tally.num_held} images are left of {KEPT + 1} revisions")
            break
        await asyncio.sleep(0.05)
    await valkey.aclose()


def _compare(loop: _Loop, base: Path, directory: Path, tally: PushTally) -> None:
    numbers = {revision: number for number, revision in enumerate(loop.revisions)}
    oracle = Oracle(base, {NAME: write_adapter(directory / "shape", base, Recipe(rank=4))})
    comparison = Comparison()
    by_revision: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], None]] = {}
    for stream in loop.streams:
        if stream.revision not in numbers:
            tally.wrong.append(f"revision {stream.revision} was never pushed")
        elif numbers[stream.revision] < stream.least:
            tally.wrong.append(f"a stream behind push {stream.least} reports push {numbers[stream.revision]}")
        by_revision.setdefault(stream.revision, {})[stream.prompt, stream.token_ids] = None
    for revision in sorted(by_revision.keys() & numbers.keys()):
        values, _ = loop.tensors(numbers[revision])
        tensors = {name: torch.from_numpy(value) for name, value in values.items()}
        set_peft_model_state_dict(oracle.model, tensors, adapter_name=NAME)
        for prompt, token_ids in by_revision[revision]:
            rows = oracle.logits([*prompt, *token_ids[:-1]], NAME)[len(prompt) - 1 :]
            for position, (row, token) in enumerate(zip(rows, token_ids, strict=True)):
                comparison.choice(f"push {numbers[revision]} at {position}", row, token)
    tally.wrong += comparison.mismatches[:20]
    tally.num_positions, tally.num_ties = comparison.positions, len(comparison.ties)
    tally.num_revisions = len(by_revision)


def run_push_campaign(directory: Path, *, num_pushes: int, num_streams: int, seed: int) -> PushTally:
    """Run a campaign in an empty directory."""
    tally = PushTally(seed=seed, num_pushes=num_pushes)
    base = write_base_model(directory / "tiny", served_base(TinyBase(name_or_path="tiny/base")))
    (directory / "imports").mkdir()
    (directory / "logs").mkdir()
    flags = StackFlags(store=STORE_FLAGS)
    with running_stack(directory / "logs", base, directory / "imports", flags) as stack:
        loop = asyncio.run(_run(stack, base, tally, num_pushes, num_streams))
    tally.num_streams, tally.num_late, tally.num_overlaps = len(loop.streams), loop.num_late, loop.num_overlaps
    tally.push_p50_s = round(float(np.median(loop.push_s)), 4)
    _compare(loop, base, directory, tally)
    return tally


def main() -> None:
    """Run a campaign and print its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=200)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraplex-push-") as directory:
        tally = run_push_campaign(
            Path(directory), num_pushes=options.pushes, num_streams=options.streams, seed=options.seed
        )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    text = json.dumps({"commit": commit, **asdict(tally)}, indent=2)
    print(text)
    if options.results is not None:
        (options.results / f"pushes_{commit[:12]}_{options.seed}.json").write_text(text + "\n")
    sys.exit(not tally.is_good)


if __name__ == "__main__":
    main()
