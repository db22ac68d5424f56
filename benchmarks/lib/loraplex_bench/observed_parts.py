"""What metrics, usage ledger and traces take of a request by themselves: its record's life, without sockets around it.

Usage: ``python -m loraplex_bench.observed_parts --collector http://HOST:PORT``, Valkey as gateways know it, prints JSON: us of
processor time that each takes for a request of so many chunks, beyond what the one before it takes. All threads count, so those
that encode and send spans do, too. What a whole gateway takes differs from turn to turn by more than all of this.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from loraplex_common import log, tracing, valkey
from loraplex_common.rpc_metrics import RpcMetrics
from loraplex_gateway.metrics.gateway import GatewayMetrics
from loraplex_gateway.prompts import TextPrompt
from loraplex_gateway.requests.access_log import RequestRecord
from loraplex_gateway.requests.request_span import begin_span
from loraplex_gateway.requests.times import RequestTimes
from loraplex_gateway.types import Chunk, Finished, FinishReason, GenerationRequest, Started, Stopping, Timings, Usage
from loraplex_gateway.usage.ledger import UsageLedger
from prometheus_client import CollectorRegistry

from loraplex_bench.uncounted_gateway import COUNTING, stop_counting

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

METHOD: Final = "loraplex.v1.GatewayService/Generate"
VARIANTS: Final = ("off", "metrics", "ledger", "traces")
"""Each has what those before it have."""
NUM_PROMPT_TOKENS: Final = 30


class Life:
    """Lets records of requests live, as the gateway's core does.

    Args:
        metrics: Counts them.
        rpc: Counts the calls.
        num_tokens: Chunks of each, of one token.
    """

    def __init__(self, metrics: GatewayMetrics, rpc: RpcMetrics, num_tokens: int) -> None:
        self._metrics, self._rpc = metrics, rpc
        stopping = Stopping(max_new_tokens=num_tokens)
        self._request = GenerationRequest(prompt=TextPrompt(text="x"), request_id="r" * 32, stopping=stopping)
        self._prepared: Any = SimpleNamespace(model=SimpleNamespace(name="tiny"), adapters=(), adapter_digests=())
        self._started = Started(
            prompt_tokens=NUM_PROMPT_TOKENS, cached_tokens=0, engine_id="e", adapter_revision="", seed=1
        )
        self._chunks = [Chunk(sequence=n, index=0, token_ids=(n,), text="x") for n in range(num_tokens)]
        usage = Usage(prompt_tokens=NUM_PROMPT_TOKENS, output_tokens=num_tokens, cached_tokens=0)
        self._finished = Finished(finish_reason=FinishReason.LENGTH, usage=usage, timings=Timings(decode_s=0.1))

    def live(self, ledger: UsageLedger | None) -> None:
        """Let one come, give its tokens, and end."""
        self._rpc.started(METHOD)
        span = begin_span(self._request)
        times = RequestTimes()
        record = RequestRecord(
            self._request, "default", metrics=self._metrics, times=times, time_left_s=None, ledger=ledger
        )
        record.span = span
        with record:
            record.prepared(self._prepared)
            attempt = record.account.attempt() if record.account is not None else None
            times.queued()
            self._metrics.queue_duration.labels("admitted").observe(0.0)
            times.started()
            record.see(self._started, num_tokens=0)
            for num_tokens, chunk in enumerate(self._chunks, 1):
                times.tokens_came()
                record.see(chunk, num_tokens=num_tokens)
            if attempt is not None:
                attempt.reported(1.0, 1.0)
            record.see(self._finished, num_tokens=len(self._chunks))
        self._rpc.finished(METHOD, "OK", 0.1)


@contextmanager
def uncounted() -> Iterator[None]:
    """Let nothing count in the block."""
    before = [(kind, name, getattr(kind, name)) for kind, name in COUNTING]
    stop_counting()
    try:
        yield
    finally:
        for kind, name, method in before:
            setattr(kind, name, method)


async def cpu_us(life: Life, ledger: UsageLedger | None, number: int) -> float:
    """Return the processor time of a request, in us, all that is written and sent afterwards included."""
    for count in (1, number):  # the first makes connections
        began_s = time.process_time()
        for _ in range(count):
            life.live(ledger)
        if ledger is not None:
            await ledger.close()
        tracing.flush()
    return (time.process_time() - began_s) / number * 1e6


async def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Return what each variant takes for a request beyond the one before it, in us: of the least of all rounds."""
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    life = Life(metrics, RpcMetrics(registry), arguments.tokens)
    client = valkey.connect(os.environ["LORAPLEX_GATEWAY_REDIS_URL"])
    ledger = UsageLedger(client, max_records=100_000, resume_window_s=0, on_record=metrics.usage.add)
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        tracing.configure("gateway", None)
        with uncounted():
            found["off"].append(await cpu_us(life, None, arguments.requests))
        found["metrics"].append(await cpu_us(life, None, arguments.requests))
        found["ledger"].append(await cpu_us(life, ledger, arguments.requests))
        tracing.configure("gateway", arguments.collector)
        found["traces"].append(await cpu_us(life, ledger, arguments.requests))
    tracing.configure("gateway", None)
    await client.aclose()
    least = {name: min(values) for name, values in found.items()}
    return {name: least[name] - least[before] for before, name in itertools.pairwise(VARIANTS)}


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of a command line; of this process's by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collector", required=True, help="where spans are sent")
    for name, default in (("--rounds", 15), ("--requests", 400), ("--tokens", 64)):
        parser.add_argument(name, type=int, default=default)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    arguments = parsed(argv)
    log.configure("gateway", "warning", "console")
    print(json.dumps(asyncio.run(measure(arguments))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
