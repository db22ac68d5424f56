"""Random JSON Schemas through random adapters at temperatures from 0 to 2, on a real engine over a real session.

``python -m support.structured_campaign --requests 500`` (``make structured-campaign``) runs any number of requests and
writes the results; the test suite runs some. Whatever ends with `stop` must be valid for `jsonschema`; what was cut must be
the beginning of a valid output.
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from loraplex.v1 import engine_pb2, gateway_pb2
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind
from loraplex_engine.constraints.tokenizer import make_vocabulary
from loraplex_engine.rpc.rule_making import RuleMaker
from support.any_request import ADAPTERS, EOS_IDS, VOCAB_SIZE
from support.base_models import write_base_model
from support.constraint_rig import compile_here
from support.engine_harness import recipe_adapter, torch_engine
from support.engine_sessions import Outcome, make_submit
from support.random_schemas import random_schema, recursive_schema
from support.request_campaign import BASE, RECIPES, constraints_of, serving

if TYPE_CHECKING:
    from loraplex_engine.constraints.tokenizer import Vocabulary
    from support.engine_sessions import EngineSessionClient

NUM_AT_ONCE: Final = 16
MAX_NEW_TOKENS: Final = 360
REQUEST_TIMEOUT_S: Final = 240.0
TEMPERATURES: Final = (0.0, 0.3, 0.7, 1.0, 1.5, 2.0)
CHECKER: Final = FormatChecker([name for name in FormatChecker.checkers if name != "time"])  # theirs has no time zones


@dataclass
class StructuredTally:
    """The results of a campaign.

    Attributes:
        seed: Seed of everything random.
        num_requests: Outputs that were checked.
        num_stopped: How many of them ended with `stop`; all of these are valid, or in `wrong`.
        num_cut: How many were cut at their length.
        num_preemptions: How often a running request was preempted, and its constraint rebuilt from its tokens.
        by_temperature: Temperature -> (requests, how many ended with `stop`).
        wrong: What went wrong, at most once per request.
    """

    seed: int
    num_requests: int = 0
    num_stopped: int = 0
    num_cut: int = 0
    num_preemptions: int = 0
    seconds: float = 0.0
    by_temperature: dict[str, list[int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StructuredRequest:
    """One request of a campaign, with what its output must be."""

    schema: Any
    temperature: float
    submit: engine_pb2.Submit


def make_structured(rng: random.Random, slot: int, number: int) -> StructuredRequest:
    """Return a random request: base or adapter, any temperature, compact or free blanks."""
    schema = recursive_schema() if rng.random() < 0.03 else random_schema(rng)
    sent = {"x-guidance": {"whitespace_flexible": False}, **schema} if rng.random() < 0.5 else schema
    temperature = rng.choice(TEMPERATURES)
    submit = make_submit(
        slot,
        [rng.randrange(4, VOCAB_SIZE - 30) for _ in range(rng.randint(1, 30))],
        MAX_NEW_TOKENS,
        request_id=f"r-{number}",
        adapter_digest=rng.choice(["", *ADAPTERS]),
        sampling=gateway_pb2.SamplingParams(temperature=temperature, seed=rng.randrange(2**32)),
        stopping=gateway_pb2.StoppingParams(max_new_tokens=MAX_NEW_TOKENS),
        structured_output=gateway_pb2.StructuredOutput(json_schema=json.dumps(sent)),
    )
    return StructuredRequest(schema, temperature, submit)


class StructuredCampaign:
    """One session with one engine, and the requests that use it."""

    def __init__(self, client: EngineSessionClient, vocabulary: Vocabulary, tally: StructuredTally, num: int) -> None:
        self._client = client
        self._vocabulary = vocabulary
        self._tally = tally
        self._rng = random.Random(tally.seed)
        self._num_left = num

    async def run(self) -> None:
        """Run all requests."""
        await asyncio.gather(*(self._work(slot) for slot in range(NUM_AT_ONCE)))

    async def _work(self, slot: int) -> None:
        while self._num_left > 0:
            self._num_left -= 1
            request = make_structured(self._rng, slot, self._num_left)
            outcome = self._client.outcomes[slot] = Outcome()
            await self._client.send(engine_pb2.SessionRequest(submits=[request.submit]))
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await outcome.ended.wait()
            self._count(request, outcome)

    def _count(self, request: StructuredRequest, outcome: Outcome) -> None:
        tally = self._tally
        tally.num_requests += 1
        at = tally.by_temperature.setdefault(str(request.temperature), [0, 0])
        at[0] += 1
        ids = [token_id for token_id in outcome.token_ids if token_id not in EOS_IDS]
        text = self._vocabulary.tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")
        if outcome.finish is None:
            tally.wrong.append(f"{request.schema} failed: {outcome.failure}")
        elif outcome.finish.finish_reason == gateway_pb2.FINISH_REASON_STOP:
            tally.num_stopped += 1
            at[1] += 1
            self._check_whole(request, text)
        else:
            tally.num_cut += 1
            self._check_beginning(request, ids, text)

    def _check_whole(self, request: StructuredRequest, text: str) -> None:
        try:
            Draft202012Validator(request.schema, format_checker=CHECKER).validate(json.loads(text))
        except (ValueError, ValidationError) as error:
            self._tally.wrong.append(f"{json.dumps(request.schema)} gave {text!r}: {str(error)[:200]}")

    def _check_beginning(self, request: StructuredRequest, ids: list[int], text: str) -> None:
        schema = request.submit.structured_output.json_schema
        try:
            compile_here(ConstraintKind.JSON_SCHEMA, schema, self._vocabulary).start(ids)
        except InvalidParameterError as error:
            self._tally.wrong.append(f"{schema} was cut at {text!r}, which does not begin an output: {error}")


async def run_structured_campaign(directory: Path, *, num_requests: int, seed: int) -> StructuredTally:
    """Run requests; raises only if engine or session is lost, every other fault is in the tally.

    Args:
        directory: Gets the base model.
        num_requests: Number of requests.
        seed: Seed of everything random.
    """
    model = write_base_model(directory / "tiny", BASE)
    constraints = constraints_of(model)
    tokenizer = (model / "tokenizer.json").read_text(encoding="utf-8")
    vocabulary = make_vocabulary(tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids=EOS_IDS)
    tally, began_s = StructuredTally(seed), time.monotonic()
    with ExitStack() as stack:
        harness = stack.enter_context(
            torch_engine(
                model,
                num_pages=240,  # fewer than all need at their longest, so that some are preempted
                num_arena_slots=64,
                block_tokens=4,
                max_model_len=512,
                max_num_seqs=NUM_AT_ONCE,
                max_num_batched_tokens=128,
                eos_token_ids=EOS_IDS,
                emulate_async=True,
                filler=constraints.filler,
            )
        )
        for digest, recipe in zip(ADAPTERS, RECIPES, strict=True):
            harness.add_adapter(*recipe_adapter(load_base_model(model), recipe, digest))
        async with serving(harness, RuleMaker(constraints.compiler, EOS_IDS)) as client:
            await StructuredCampaign(client, vocabulary, tally, num_requests).run()
        await constraints.close()
        assert harness.engine.is_healthy, harness.crashes
        tally.num_preemptions = harness.engine.counters.num_preemptions
    tally.seconds = round(time.monotonic() - began_s, 1)
    return tally


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory() as directory:
        tally = asyncio.run(run_structured_campaign(Path(directory), num_requests=arguments.requests, seed=seed))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    text = json.dumps({"commit": commit, **asdict(tally)}, indent=2)
    print(text)
    if arguments.results is not None:
        (arguments.results / f"structured_{commit[:12]}_{seed}.json").write_text(text + "\n")
    return 1 if tally.wrong or tally.num_stopped < 0.8 * tally.num_requests else 0


if __name__ == "__main__":
    sys.exit(main())
