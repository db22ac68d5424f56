"""Random adapters of every served method mixed at random on a real engine whose pool holds few of them, against PEFT.

``python -m support.adapter_campaign --rounds 50`` (``make adapter-campaign``) runs any number of rounds and writes the results;
the test suite runs some. A round has a base model of its own and one adapter of each method, with random targets, ranks and
values, written by PEFT (FLoRA: by us) and read as the store reads them. Requests of all of them and of the base run at once,
so that adapters leave the pool and come back. PEFT is then forced along each output: every token must be its choice, or a tie,
and every probability its own (docs/testing.md).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest import mock

import numpy as np
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.sampling_params import SamplingParams
from support.campaign_adapters import INVOCATION, METHODS, AdapterOfMethod, write_adapters
from support.engine_harness import EngineHarness, Generation, torch_engine
from support.oracle import MAX_LOGIT_ERROR, MAX_TIES, TIE_GAP, Oracle
from support.peft_methods import BASES, base_dir

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec
    from numpy.typing import NDArray

BASE_NAMES: Final = ("llama", "qwen2")
NUM_LOGPROBS: Final = 5
MAX_PROMPT, MAX_OUTPUT = 36, 10


@dataclass
class AdapterTally:
    """The results of a campaign.

    Attributes:
        seed: Seed of everything random.
        num_requests: Outputs that were compared.
        num_positions: Tokens that were compared.
        num_ties: How many of them PEFT could as well have drawn.
        num_skipped: Tokens behind an invocation that an activated adapter generated: PEFT begins anew there.
        num_reloads: Loads of adapters that had been in the pool before.
        num_preemptions: How often a running request was preempted.
        logit_error: Largest error of a log probability, relative to the largest logit.
        by_method: Method, or ``base`` -> tokens that were compared.
        wrong: What went wrong.
    """

    seed: int
    num_rounds: int = 0
    num_requests: int = 0
    num_positions: int = 0
    num_ties: int = 0
    num_skipped: int = 0
    num_reloads: int = 0
    num_preemptions: int = 0
    logit_error: float = 0.0
    seconds: float = 0.0
    by_method: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether everything equals PEFT, as docs/testing.md defines it."""
        has_few_ties = self.num_ties <= max(1, MAX_TIES * self.num_positions)
        return not self.wrong and has_few_ties and self.logit_error < MAX_LOGIT_ERROR


@dataclass(frozen=True)
class Case:
    """A request: its adapter's method, its prompt, and where its adapter begins."""

    method: str
    prompt: list[int]
    start: int | None


def random_cases(rng: np.random.Generator, count: int, vocab_size: int) -> list[Case]:
    """Return requests of the base and of every method in turn, shuffled."""
    cases = []
    for number in range(count):
        method = ("base", *METHODS)[number % (len(METHODS) + 1)]
        prompt = rng.integers(10, vocab_size, int(rng.integers(1, MAX_PROMPT))).tolist()
        start = None
        if method == "alora":
            start = int(rng.integers(0, len(prompt) + 1))
            prompt[start:start] = INVOCATION
        cases.append(Case(method, prompt, start))
    return [cases[at] for at in rng.permutation(count)]


class Round:
    """One base model with an adapter of each method, and the engine that serves them."""

    def __init__(self, folder: Path, rng: np.random.Generator, tally: AdapterTally) -> None:
        self._rng, self._tally = rng, tally
        self._base = str(rng.choice(BASE_NAMES))
        self._adapters = write_adapters(folder, self._base, rng)
        self._loads: list[str] = []

    def run(self, num_requests: int) -> None:
        """Run requests of all adapters at once and compare each with PEFT."""
        model_dir, rng = base_dir(self._base), self._rng
        with torch_engine(model_dir, block_tokens=4) as probe:
            images = {method: each.image(probe.engine.geometry) for method, each in self._adapters.items()}
        pages = sorted(len(image) for _, image in images.values())
        load_adapter = TorchRunner.load_adapter

        def counting(runner: TorchRunner, index: int, spec: AdapterSpec, *rest: NDArray[np.generic]) -> object:
            self._loads.append(spec.digest)
            return load_adapter(runner, index, spec, *rest)  # type: ignore[arg-type]

        with (
            mock.patch.object(TorchRunner, "load_adapter", counting),
            torch_engine(
                model_dir,
                num_pages=sum(pages[-int(rng.integers(1, 4)) :]) + 28,
                num_arena_slots=2 * sum(pages),
                block_tokens=4,
                max_num_seqs=8,
                max_num_batched_tokens=48,
                emulate_async=bool(rng.integers(2)),
            ) as harness,
        ):
            for spec, image in images.values():
                harness.images[spec.digest] = spec, image
            digests = {method: spec.digest for method, (spec, _) in images.items()}
            self._serve(harness, digests, num_requests)
            self._tally.num_preemptions += harness.engine.counters.num_preemptions
        self._tally.num_reloads += len(self._loads) - len(set(self._loads))

    def _serve(self, harness: EngineHarness, digests: dict[str, str], num_requests: int) -> None:
        cases = random_cases(self._rng, num_requests, BASES[self._base].vocab_size)
        generations = [
            harness.submit(
                case.prompt,
                adapter=digests.get(case.method),
                adapter_start=case.start,
                max_new_tokens=int(self._rng.integers(1, MAX_OUTPUT + 1)),
                sampling=SamplingParams(temperature=0.0, num_logprobs=NUM_LOGPROBS),
            )
            for case in cases
        ]
        harness.wait(generations)
        harness.check_idle()
        base = Oracle(base_dir(self._base))
        for case, generation in zip(cases, generations, strict=True):
            truth: Oracle | AdapterOfMethod = self._adapters.get(case.method, base)
            self._compare(case, generation, truth)

    def _compare(self, case: Case, generation: Generation, truth: Oracle | AdapterOfMethod) -> None:
        tally = self._tally
        tally.num_requests += 1
        assert generation.end is not None
        if generation.end.error is not None:
            tally.wrong.append(f"{case}: {generation.end.error}")
            return
        tokens = [*case.prompt, *generation.tokens]
        logits = truth.logits(tokens, None)
        for at, (token, reported) in enumerate(zip(generation.tokens, generation.logprobs, strict=True)):
            place = len(case.prompt) + at
            if case.start is not None and _is_invoked(tokens[case.start + 1 :]):
                tally.num_skipped += 1
                continue
            self._count(f"{self._base} {case} token {at}", case.method, logits[place - 1].astype(np.float64), token)
            found = reported.logprobs[1:].astype(np.float64)
            true = (logits[place - 1] - np.logaddexp.reduce(logits[place - 1].astype(np.float64)))[
                reported.token_ids[1:]
            ]
            error = float(np.abs(found - true).max() / np.abs(logits[place - 1]).max())
            tally.logit_error = max(tally.logit_error, error)
            if not error < MAX_LOGIT_ERROR:
                tally.wrong.append(f"{self._base} {case} token {at}: log probabilities are {error:.1e} off")

    def _count(self, what: str, method: str, logits: NDArray[np.float64], token: int) -> None:
        tally = self._tally
        tally.num_positions += 1
        tally.by_method[method] = tally.by_method.get(method, 0) + 1
        gap = float(logits.max() - logits[token])
        if gap == 0:
            return
        if gap < TIE_GAP:
            tally.num_ties += 1
        else:
            tally.wrong.append(f"{what}: drew {token}, PEFT {int(logits.argmax())}, {gap:.2e} apart")


def _is_invoked(tokens: list[int]) -> bool:
    size = len(INVOCATION)
    return any(tuple(tokens[at : at + size]) == INVOCATION for at in range(len(tokens) - size + 1))


def run_adapter_campaign(directory: Path, *, num_rounds: int, num_requests: int, seed: int) -> AdapterTally:
    """Run rounds; faults are in the tally.

    Args:
        directory: Gets the adapters.
        num_rounds: Rounds, each with adapters of its own.
        num_requests: Requests of a round.
        seed: Seed of everything random.
    """
    tally, began_s = AdapterTally(seed), time.monotonic()
    for number in range(num_rounds):
        Round(directory / str(number), np.random.default_rng([seed, number]), tally).run(num_requests)
        tally.num_rounds += 1
    tally.seconds = round(time.monotonic() - began_s, 1)
    return tally


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=44, help="requests of a round")
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory() as directory:
        tally = run_adapter_campaign(
            Path(directory), num_rounds=arguments.rounds, num_requests=arguments.requests, seed=seed
        )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    text = json.dumps({"commit": commit, **asdict(tally)}, indent=2)
    print(text)
    if arguments.results is not None:
        (arguments.results / f"adapters_{commit[:12]}_{seed}.json").write_text(text + "\n")
    return 0 if tally.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
