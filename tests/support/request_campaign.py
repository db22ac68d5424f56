"""Random requests of every kind against one engine over a real session, while other requests' streams are checked.

``python -m support.request_campaign --requests 100000`` (``make campaign``) runs any number of requests and writes the
results; the test suite runs some.
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
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex.v1 import adapter_pb2, engine_pb2, engine_pb2_grpc, gateway_pb2
from loraplex_common.base_model import load_base_model
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from loraplex_common.rpc_metrics import RpcMetrics
from loraplex_engine.config import EngineConfig
from loraplex_engine.constraints.compiler import make_constraints
from loraplex_engine.loop.residency_feed import ResidencyFeed
from loraplex_engine.metrics.requests import RequestMetrics
from loraplex_engine.rpc.draining import Draining
from loraplex_engine.rpc.rule_making import RuleMaker
from loraplex_engine.rpc.servicer import EngineIdentity, EngineServicer
from prometheus_client import CollectorRegistry
from support.adapters import Recipe
from support.any_request import (
    ADAPTERS,
    EOS_IDS,
    MAX_BATCHED_TOKENS,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    check,
    make_request,
)
from support.base_models import TinyBase, write_base_model
from support.engine_harness import recipe_adapter, torch_engine
from support.engine_sessions import EngineSessionClient, Outcome, make_submit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from loraplex_engine.constraints.compiler import Constraints
    from support.engine_harness import EngineHarness

NUM_AT_ONCE = 20
REQUEST_TIMEOUT_S = 60.0
BASE = TinyBase(
    num_layers=1, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=2, head_dim=16, vocab_size=VOCAB_SIZE
)
RECIPES = (Recipe(rank=8, seed=1), Recipe(rank=3, seed=2, targets=("q_proj", "down_proj")), Recipe(rank=1, seed=3))
STRANGERS: tuple[dict[str, Any], ...] = (
    {"prompt": [11, 12, 13], "max_new_tokens": 20},
    {"prompt": list(range(60, 100)), "max_new_tokens": 12, "adapter_digest": ADAPTERS[0]},
    {"prompt": [21] * 5, "max_new_tokens": 30, "adapter_digest": ADAPTERS[1], "logprobs": 2, "prompt_logprobs": 1},
    {
        "prompt": list(range(200, 210)),
        "max_new_tokens": 16,
        "adapter_digest": ADAPTERS[2],
        "sampling": gateway_pb2.SamplingParams(temperature=0.8, seed=7, top_k=20, frequency_penalty=0.5),
    },
    {
        "prompt": [31, 32],
        "max_new_tokens": 20,
        "adapter_digest": ADAPTERS[0],
        "sampling": gateway_pb2.SamplingParams(temperature=1.0, seed=3),
        "structured_output": gateway_pb2.StructuredOutput(regex=r"[a-z]{30,40}"),
        "bad_token_sequences": [gateway_pb2.TokenIds(ids=[40, 41])],
    },
)


@dataclass
class Tally:
    """The results of a campaign.

    Attributes:
        wrong: What went wrong, at most once per request.
        ends: Finish reason or class of error -> how many requests ended so.
        num_strangers: Streams of other requests that were compared with their tokens when run alone.
        num_preemptions: How often a running request was preempted.
    """

    seed: int
    num_requests: int = 0
    num_strangers: int = 0
    num_preemptions: int = 0
    seconds: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def count(self, outcome: Outcome) -> None:
        """Note how a request ended."""
        self.num_requests += 1
        name = gateway_pb2.FinishReason.Name(outcome.finish.finish_reason) if outcome.finish is not None else ""
        name = name or type(outcome.failure).__name__
        self.ends[name] = self.ends.get(name, 0) + 1


class Campaign:
    """One session with one engine, and the requests that use it."""

    def __init__(self, client: EngineSessionClient, tally: Tally, num_requests: int) -> None:
        self._client = client
        self._tally = tally
        self._rng = random.Random(tally.seed)
        self._num_left = num_requests
        self._free = list(range(NUM_AT_ONCE + len(STRANGERS)))  # slots are reused, as a gateway's are

    async def run(self) -> None:
        """Run all requests beside the streams that are compared."""
        alone = [await self._stranger(fields) for fields in STRANGERS]
        strangers = [
            asyncio.create_task(self._repeat(fields, tokens)) for fields, tokens in zip(STRANGERS, alone, strict=True)
        ]
        try:
            await asyncio.gather(*(self._work() for _ in range(NUM_AT_ONCE)))
        finally:
            self._num_left = 0
            await asyncio.gather(*strangers)

    async def _work(self) -> None:
        while self._num_left > 0:
            self._num_left -= 1
            slot = self._free.pop()
            request = make_request(self._rng, slot)
            outcome = await self._answer(request.submit)
            self._free.append(slot)
            self._tally.count(outcome)
            try:
                check(request, outcome)
            except AssertionError as error:
                self._tally.wrong.append(f"{error} of {request.submit} with {outcome}")

    async def _repeat(self, fields: dict[str, Any], alone: Outcome) -> None:
        while self._num_left > 0:
            beside = await self._stranger(fields)
            self._tally.num_strangers += 1
            if (beside.token_ids, len(beside.logprobs)) != (alone.token_ids, len(alone.logprobs)):
                self._tally.wrong.append(f"{fields} gave {beside}, alone {alone}")

    async def _stranger(self, fields: dict[str, Any]) -> Outcome:
        slot = self._free.pop()
        outcome = await self._answer(make_submit(slot, **fields))
        self._free.append(slot)
        return outcome

    async def _answer(self, submit: engine_pb2.Submit) -> Outcome:
        outcome = self._client.outcomes[submit.slot] = Outcome()
        await self._client.send(engine_pb2.SessionRequest(submits=[submit]))
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await outcome.ended.wait()
        except TimeoutError:
            raise AssertionError(f"no end of {submit}; session: {self._client.failure}") from None
        return outcome


@asynccontextmanager
async def serving(harness: EngineHarness, rules: RuleMaker | None = None) -> AsyncIterator[EngineSessionClient]:
    """Serve a harness's engine on a free port and open a session with it; ``rules`` makes what outputs must keep to."""
    registry = CollectorRegistry()
    base = adapter_pb2.BaseModel(name="tiny", vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
    servicer = EngineServicer(
        harness.engine,
        ResidencyFeed(16),
        Draining(harness.engine),
        identity=EngineIdentity(engine_id="e", base_model=base, version="0"),
        config=EngineConfig(model=Path()),
        metrics=RequestMetrics(registry),
        rules=rules or RuleMaker(constraints_of(Path()).compiler, EOS_IDS),
    )
    server = GrpcServer(ServerConfig(), metrics=RpcMetrics(registry))
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server.server)
    port = await server.start()
    try:
        async with EngineSessionClient(f"127.0.0.1:{port}") as client:
            yield client
            assert not client.is_over.is_set(), f"the session ended: {client.failure}"
    finally:
        servicer.close_streams()
        await server.drain(settle_s=0.0, grace_s=0.0)


def constraints_of(model: Path) -> Constraints:
    """Return what structured outputs of a model of `VOCAB_SIZE` tokens need."""
    return make_constraints(model, vocab_size=VOCAB_SIZE, eos_token_ids=EOS_IDS)


async def run_campaign(
    directory: Path, *, num_requests: int, seed: int, is_async: bool = False, kv_dtype: str = ""
) -> Tally:
    """Run requests; raises only if engine, session or a stream is lost, every other fault is in the tally.

    Args:
        directory: Gets the base model.
        num_requests: Number of requests.
        seed: Seed of everything random.
        is_async: Whether the runner lags behind, as a GPU does, with two steps in flight.
        kv_dtype: What keys and values are, as `PoolGeometry` has it.
    """
    model = write_base_model(directory / "tiny", BASE)
    engine = partial(
        torch_engine,
        model,
        num_pages=150 if kv_dtype else 72,  # pages of FP8 are a third as large, adapters are not
        num_arena_slots=256 if kv_dtype else 64,
        block_tokens=4,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=12,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        eos_token_ids=EOS_IDS,
        emulate_async=is_async,
        kv_dtype=kv_dtype,
    )
    return await run_campaign_on(engine, model, num_requests=num_requests, seed=seed)


async def run_campaign_on(
    engine: Callable[..., AbstractContextManager[EngineHarness]], model: Path, *, num_requests: int, seed: int
) -> Tally:
    """Run requests on an engine of a model with `VOCAB_SIZE` tokens; otherwise like `run_campaign`."""
    tally, began_s, constraints = Tally(seed), time.monotonic(), constraints_of(model)
    with engine(filler=constraints.filler) as harness:
        for digest, recipe in zip(ADAPTERS, RECIPES, strict=True):
            harness.add_adapter(*recipe_adapter(load_base_model(model), recipe, digest))
        async with serving(harness, RuleMaker(constraints.compiler, EOS_IDS)) as client:
            await Campaign(client, tally, num_requests).run()
        await constraints.close()
        assert harness.engine.is_healthy, harness.crashes
        await asyncio.to_thread(harness.check_idle)
        tally.num_preemptions = harness.engine.counters.num_preemptions
    tally.seconds = round(time.monotonic() - began_s, 1)
    return tally


def main() -> int:
    """Run a campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--is-async", action="store_true", help="two steps in flight, as on a GPU")
    parser.add_argument("--results", type=Path, default=None, metavar="DIR", help="where to write what came of it")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory() as directory:
        campaign = run_campaign(
            Path(directory), num_requests=arguments.requests, seed=seed, is_async=arguments.is_async
        )
        tally = asyncio.run(campaign)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    text = json.dumps({"commit": commit, **asdict(tally)}, indent=2)
    print(text)
    if arguments.results is not None:
        (arguments.results / f"campaign_{commit[:12]}_{seed}.json").write_text(text + "\n")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
