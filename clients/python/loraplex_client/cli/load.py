"""``loraplex load``: a load test of a running deployment."""

import asyncio
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from loraplex_client._aio.client import AsyncClient
from loraplex_client.cli.context import Target, identity_of, stderr, stdout
from loraplex_client.cli.demand_options import DemandOptions, SloTtft
from loraplex_client.cli.generate import ModelName
from loraplex_client.cli.option_groups import grouped
from loraplex_client.load import DEFAULT_TIMEOUT_S, DEFAULT_VOCAB_SIZE, LoadResult, LoadTest
from loraplex_client.plan import make_trace
from loraplex_client.workload import Trace, from_spec

NOTABLE_LAG_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficOptions:
    """Which requests come, and when."""

    workload: Annotated[
        str | None,
        typer.Option(
            help="burst:N:R, rate:N:RATE:S or slora:N:ALPHA:RATE:CV:S, instead of the options up to --cv.",
            metavar="SPEC",
        ),
    ] = None
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 1.0
    requests: Annotated[int, typer.Option(help="Requests to send.", min=1)] = 100
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter to ask for, may be given again (default: all).", metavar="NAME")
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SendingOptions:
    """How requests are sent."""

    limit: Annotated[float | None, typer.Option(help="Stop after so many seconds.", min=0.0)] = None
    timeout: Annotated[float, typer.Option(help="Deadline of each request, seconds.")] = DEFAULT_TIMEOUT_S
    vocab_size: Annotated[int, typer.Option(help="Prompts are random token ids below it.", min=21)] = DEFAULT_VOCAB_SIZE
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts; prompts of another seed are not cached.")] = 0


@grouped
def load(
    context: typer.Context,
    *,
    traffic: TrafficOptions,
    demand: DemandOptions,
    slo_ttft: SloTtft = 1.0,
    attainment: Annotated[float, typer.Option(help="Share of requests that must finish within it.")] = 0.0,
    sending: SendingOptions,
    model: ModelName = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    target: Target = None,
) -> None:
    """Send a load to a gateway at its times, however slow the answers are, and say what came back.

    The options are those of `loraplex plan`. Exit code 1 if none finished, or fewer than --attainment of all with their first
    token within --slo-ttft.
    """
    if not 0 <= attainment <= 1:
        raise typer.BadParameter("--attainment must be in 0..1")

    async def run() -> LoadResult:
        client = _client(context, target)
        try:
            return await _send(client, traffic, demand, sending, model)
        finally:
            await client.close()

    result = asyncio.run(run())
    figures = _figures(result, slo_ttft)
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        _print(figures, slo_ttft, result)
    if figures["attainment"] < attainment or not figures["finished"]:
        raise typer.Exit(1)


def _client(context: typer.Context, target: str | None) -> AsyncClient:
    credentials, profile = identity_of(context)
    return AsyncClient(
        target,
        api_key=credentials.api_key,
        tls_ca=credentials.tls_ca,
        tls_cert=credentials.tls_cert,
        tls_key=credentials.tls_key,
        profile=profile,
    )


async def _send(
    client: AsyncClient, traffic: TrafficOptions, demand: DemandOptions, sending: SendingOptions, model: str
) -> LoadResult:
    names = traffic.adapter or [served.name for served in await client.list_models() if served.is_adapter]
    seed = sending.seed
    try:
        trace = _trace(traffic, demand, len(names), seed)
        test = LoadTest(
            client, trace, names, model=model, seed=seed, vocab_size=sending.vocab_size, timeout_s=sending.timeout
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with stderr.status(f"{len(trace)} requests over {float(trace.arrival_s[-1]):.0f} s"):
        return await test.run(limit_s=sending.limit)


def _trace(traffic: TrafficOptions, demand: DemandOptions, num_adapters: int, seed: int) -> Trace:
    if traffic.workload is not None:
        return from_spec(traffic.workload)
    return make_trace(
        demand.demand(num_adapters=num_adapters, rate=traffic.rate, num_requests=traffic.requests, seed=seed)
    )


def _figures(result: LoadResult, slo_ttft_s: float) -> dict[str, Any]:
    """Return what is printed: times in seconds, None where no request has one."""
    measured = result.measured
    lags = result.lag_s[~np.isnan(result.lag_s)]
    numbers = {
        "attainment": measured.attainment(slo_ttft_s),
        "requests_per_s": measured.requests_per_s,
        "output_tokens_per_s": measured.output_tokens_per_s,
        "ttft_p50_s": measured.ttft_percentile(50),
        "ttft_p99_s": measured.ttft_percentile(99),
        "tpot_p50_s": measured.tpot_percentile(50),
        "tpot_p99_s": measured.tpot_percentile(99),
        "lag_p99_s": float(np.percentile(lags, 99)) if len(lags) else math.nan,
    }
    return {
        "requests": len(measured.trace),
        "finished": int(measured.is_finished.sum()),
        "adapters": measured.trace.num_adapters,
        "wall_s": measured.wall_s,
        "resumes": result.num_resumes,
        "errors": dict(result.errors.most_common()),
        **{name: None if math.isnan(value) else value for name, value in numbers.items()},
    }


def _print(figures: dict[str, Any], slo_ttft_s: float, result: LoadResult) -> None:
    def seconds(name: str) -> str:
        return "-" if figures[name] is None else f"{figures[name]:.3f} s"

    table = Table(
        "FINISHED", f"WITHIN {slo_ttft_s:g} S", "REQ/S", "TOK/S", "TTFT P50", "P99", "TPOT P50", "P99", box=None
    )
    table.add_row(
        f"{figures['finished']} of {figures['requests']}",
        f"{figures['attainment']:.1%}",
        f"{figures['requests_per_s']:.2f}",
        f"{figures['output_tokens_per_s']:.1f}",
        *(seconds(name) for name in ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")),
    )
    stdout.print(table)
    for reason, count in figures["errors"].items():
        first = next(text for text in result.measured.failures if f": {reason}: " in text)
        stderr.print(f"{count} x {reason}, the first: {first}", soft_wrap=True)
    if result.num_resumes:
        stderr.print(f"note: streams went on {result.num_resumes} times after their connection or gateway was lost")
    if (figures["lag_p99_s"] or 0.0) > NOTABLE_LAG_S:
        stderr.print(
            f"note: this machine sent requests up to {figures['lag_p99_s']:.3f} s late (p99); waits include that",
            soft_wrap=True,
        )
