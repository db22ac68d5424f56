"""``loraplex adapters push``, ``labels``, ``history``, ``rollback``."""

from pathlib import Path
from typing import Annotated

import typer
from loraplex_common.sizes import format_size
from rich.table import Table

from loraplex_client.adapter_files import read_tensors
from loraplex_client.cli.context import StoreTarget, connect, stderr, stdout, warn_of_late_gateways
from loraplex_client.cli.wording import as_flags

Name = Annotated[str, typer.Argument(help="The adapter's name.", metavar="NAME", show_default=False)]
Expect = Annotated[
    str | None, typer.Option(help="Fail unless the label points here now (empty: nowhere).", metavar="REVISION")
]


def push(
    context: typer.Context,
    name: Name,
    directory: Annotated[
        Path, typer.Argument(help="A PEFT directory of weights alone.", metavar="DIR", show_default=False)
    ],
    label: Annotated[str, typer.Option(help="Label to move to the new revision besides latest.")] = "",
    expect: Expect = None,
    base_model: Annotated[str, typer.Option(help="Base to check against instead of the one it names.")] = "",
    stage: Annotated[bool, typer.Option("--stage", help="Leave latest where it is.")] = False,
    ready_timeout: Annotated[
        float, typer.Option(help="How long labels wait for engines; 0 for not at all.", metavar="SECONDS", min=0)
    ] = 10.0,
    store_target: StoreTarget = None,
) -> None:
    """Push an adapter's tensors; labels move once engines that hold the old revision hold the new one."""
    tensors, config = read_tensors(directory)
    with connect(context, store_target=store_target) as client:
        result = client.adapters.push(
            name,
            tensors,
            config,
            label=label,
            expected=expect,
            stage=stage,
            ready_timeout_s=ready_timeout,
            base_model=base_model,
        )
    size = format_size(result.revision.canonical_bytes)
    ready = f"; ready on {', '.join(result.ready_engines)}" if result.ready_engines else ""
    stdout.print(f"pushed {name}@{result.revision.digest[:12]}: {size}{ready}", soft_wrap=True)
    for warning in result.warnings:
        stderr.print(f"warning: {as_flags(warning)}", soft_wrap=True)
    warn_of_late_gateways(result.late_gateways)
    if result.late_engines:
        late = ", ".join(result.late_engines)
        stderr.print(f"warning: after {result.ready_timeout_s:g} s not yet on {late}", soft_wrap=True)


def labels(context: typer.Context, name: Name, store_target: StoreTarget = None) -> None:
    """Show where an adapter's labels point."""
    table = Table("LABEL", "REVISION", "SHARE", box=None)
    with connect(context, store_target=store_target) as client:
        adapter = client.adapters.get(name)
    for label, revision in sorted(adapter.aliases.items()):
        shares = adapter.shares.get(label, {revision: 1})
        total = sum(shares.values())
        for number, (digest, weight) in enumerate(sorted(shares.items())):
            table.add_row("" if number else label, digest, f"{weight / total:.1%}")
    stdout.print(table)


def history(
    context: typer.Context,
    name: Name,
    label: Annotated[str, typer.Option(help="Only this label.")] = "",
    store_target: StoreTarget = None,
) -> None:
    """Show where an adapter's labels have pointed, newest first."""
    table = Table("TIME", "LABEL", "CAUSE", "FROM", "TO", box=None)
    with connect(context, store_target=store_target) as client:
        for move in client.adapters.moves(name, label=label):
            time = f"{move.time:%Y-%m-%d %H:%M:%S}" if move.time else "-"
            total = sum(move.shares.values())
            shares = ", ".join(f"{digest[:12]} {weight / total:.1%}" for digest, weight in sorted(move.shares.items()))
            to = shares or move.revision[:12] or "-"
            table.add_row(time, move.label, move.cause, move.left_revision[:12] or "-", to)
    stdout.print(table)


def rollback(
    context: typer.Context,
    name: Name,
    label: Annotated[str, typer.Option(help="The label.")] = "latest",
    expect: Expect = None,
    store_target: StoreTarget = None,
) -> None:
    """Point a label at what it left last; twice in a row leaves it where it was."""
    with connect(context, store_target=store_target) as client:
        done = client.adapters.roll_back(name, label=label, expected_revision=expect)
    stdout.print(f"{name}:{label} {done.left_revision[:12]} -> {done.revision[:12]}", soft_wrap=True)
