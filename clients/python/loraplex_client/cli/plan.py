"""``loraplex plan``: how many GPUs, by simulation."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from loraplex_common.sizes import parse_size
from rich.table import Table
from rich.text import Text

from loraplex_client.cli.context import stderr, stdout
from loraplex_client.cli.demand_options import DemandOptions, SloTtft
from loraplex_client.cli.option_groups import grouped
from loraplex_client.plan import (
    Demand,
    DemandError,
    Plan,
    Simulation,
    find_plan,
    make_trace,
    read_ranks,
    save_trace,
    simulate,
)
from loraplex_client.plan.figure import plan_chart

BAR_WIDTH: Final = 40
MIB: Final = 2**20
GIB: Final = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetOptions:
    """What serves."""

    model: Annotated[str, typer.Option(help="A known shape, e.g. llama3-8b, or a config.json.")] = "llama3-8b"
    text_only: Annotated[bool, typer.Option("--text-only", help="Size the text part of a multimodal model.")] = False
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, l40s or a10g.")] = "h100"
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="GPUs of each engine, which has a part of every weight and adapter on each.")
    ] = 1
    kv_cache_dtype: Annotated[str, typer.Option(help="Type of keys and values: auto or fp8.")] = "auto"
    ranks: Annotated[str, typer.Option(help="Ranks; adapter i has the (i mod n)-th.", metavar="R,R,...")] = "16"
    targets: Annotated[str, typer.Option(help="all projections, or qkvo.")] = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """What is looked for, and how."""

    slo_tpot: Annotated[float | None, typer.Option(help="Objective for each further token, seconds.")] = None
    attainment: Annotated[float, typer.Option(help="Share of requests that must meet them.")] = 0.99
    routing: Annotated[str, typer.Option(help="affinity, as the gateway does, or random.")] = "affinity"
    arena_bytes: Annotated[str, typer.Option(help="Host memory for adapters, per GPU.")] = "64GiB"
    max_gpus: Annotated[int, typer.Option(help="Largest fleet to try.", min=1)] = 64
    requests: Annotated[int, typer.Option(help="Requests to simulate.", min=1)] = 4000
    seed: Annotated[int, typer.Option(help="Of the trace.")] = 0


@grouped
def plan(
    *,
    adapters: Annotated[int, typer.Option(help="Number of adapters.", show_default=False)],
    rate: Annotated[float, typer.Option(help="Requests per second.", show_default=False)],
    fleet: FleetOptions,
    load: DemandOptions,
    slo_ttft: SloTtft = 1.0,
    search: SearchOptions,
    svg: Annotated[Path | None, typer.Option(help="Write the plot here, too.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Find the fewest GPUs that serve a load within its objectives, by simulating the engine.

    Exit code 1 if the largest fleet allowed does not suffice.
    """
    attainment = search.attainment
    try:
        demand = load.demand(num_adapters=adapters, rate=rate, num_requests=search.requests, seed=search.seed)
        question = _question(adapters, fleet, slo_ttft, search)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if search.max_gpus < fleet.tensor_parallel:
        raise typer.BadParameter(
            f"--max-gpus {search.max_gpus} are fewer than --tensor-parallel {fleet.tensor_parallel}"
        )
    found = _search(demand, question, attainment=attainment, max_gpus=search.max_gpus)
    if svg is not None:
        svg.write_text(plan_chart(found, attainment=attainment))
    if as_json:
        document = {"num_gpus": found.num_gpus, "trials": [asdict(trial) for trial in found.trials]}
        print(json.dumps(document, indent=1))
    else:
        _print(found, attainment, fleet)
    if found.num_gpus is None:
        raise typer.Exit(1)


def _question(adapters: int, fleet: FleetOptions, slo_ttft: float, search: SearchOptions) -> dict[str, Any]:
    return _model_of(fleet.model) | {
        "text_only": fleet.text_only,
        "gpu": fleet.gpu,
        "kv_cache_dtype": fleet.kv_cache_dtype,
        "tensor_parallel": fleet.tensor_parallel,
        "num_adapters": adapters,
        "ranks": read_ranks(fleet.ranks),
        "targets": fleet.targets,
        "routing": search.routing,
        "slo_ttft_s": slo_ttft,
        "slo_tpot_s": search.slo_tpot,
        "arena_bytes": parse_size(search.arena_bytes),
    }


def _model_of(model: str) -> dict[str, Any]:
    """Return the question's fields for a known shape or a config.json."""
    if not model.endswith(".json"):
        return {"model": model}
    path = Path(model)
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise DemandError(f"--model {model}: {error.strerror}") from error
    except ValueError as error:
        raise DemandError(f"--model {model}: {error}") from error
    if not isinstance(config, dict) or not config:
        raise DemandError(f"--model {model}: no JSON object")
    return {"model": path.resolve().parent.name, "config": config}


def _search(demand: Demand, question: dict[str, Any], *, attainment: float, max_gpus: int) -> Plan:
    if not 0 < attainment <= 1:
        raise typer.BadParameter("--attainment must be in 0..1")
    with tempfile.TemporaryDirectory(prefix="loraplex-plan-") as folder:
        path = Path(folder) / "trace.npz"
        save_trace(make_trace(demand), path)

        degree = question["tensor_parallel"]

        def ask(num_engines: int) -> Simulation:
            with stderr.status(f"simulating {num_engines * degree} GPU{'s' if num_engines * degree > 1 else ''}"):
                return simulate(question | {"trace": str(path), "num_engines": num_engines})

        return find_plan(ask, attainment=attainment, max_gpus=max_gpus, degree=degree)


def _print(found: Plan, attainment: float, fleet: FleetOptions) -> None:
    columns = ("GPUS", "ATTAINED", "", "TTFT P50", "P99", "TPOT P50", "P99", "ON DEVICE", "IN HOST", "MISS", "BUSY")
    table = Table(*columns, box=None)
    for trial in found.trials:
        one = trial.simulation
        style = "bold" if trial.num_gpus == found.num_gpus else ""
        table.add_row(
            str(trial.num_gpus),
            f"{one.attainment:.1%}",
            _bar(one.attainment, attainment),
            f"{one.ttft_p50_s:.3f} s",
            f"{one.ttft_p99_s:.3f} s",
            f"{one.tpot_p50_s * 1e3:.1f} ms",
            f"{one.tpot_p99_s * 1e3:.1f} ms",
            f"{one.resident_share:.1%}",
            f"{one.arena_share:.1%}",
            f"{one.miss_share:.1%}",
            f"{one.busy_share:.0%}",
            style=style,
        )
    stdout.print(table)
    last, gpu = found.trials[-1].simulation, fleet.gpu
    _print_sizes(last.sizes, fleet.tensor_parallel)
    if not last.is_measured:
        stdout.print(f"note: the rates of {gpu} are {last.source}", soft_wrap=True)
    if found.num_gpus is None:
        stdout.print(f"{found.trials[-1].num_gpus} GPUs reach {last.attainment:.1%}, not {attainment:.1%}")
    else:
        stdout.print(Text.assemble((f"{found.num_gpus} x {gpu}", "bold"), " meet the objective"))


def _print_sizes(sizes: Mapping[str, float], degree: int) -> None:
    """Say what fits where."""
    each = "each GPU" if degree == 1 else f"each engine of {degree} GPUs"
    stdout.print(
        f"{each}: {sizes['pool_kv_tokens']:,.0f} tokens of KV, or {sizes['pool_adapters']:,.0f} adapters, share its "
        f"pool; {sizes['arena_adapters']:,.0f} adapters fit its host memory",
        soft_wrap=True,
    )
    if degree > 1:
        stdout.print(
            f"each GPU: {sizes['weight_bytes'] / GIB:,.1f} GiB of weights, {sizes['adapter_bytes_mean'] / MIB:,.1f} MiB of a mean "
            f"adapter; a step takes {sizes['step_floor_s'] * 1e3:.1f} ms at least, {sizes['collective_s'] * 1e3:.1f} ms of it "
            "collectives",
            soft_wrap=True,
        )
        stdout.print(
            "note: engines do not serve --tensor-parallel on GPUs yet; this is what it would take", soft_wrap=True
        )


def _bar(share: float, objective: float) -> str:
    """Return a bar of a share with a mark at the objective."""
    cells = ["#" if (cell + 0.5) / BAR_WIDTH <= share else "." for cell in range(BAR_WIDTH)]
    cells[min(BAR_WIDTH - 1, int(objective * BAR_WIDTH))] = "|"
    return "".join(cells)
