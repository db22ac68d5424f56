"""``loraplex adapters apply``: a store as a file says."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex_client.adapter_apply import Applier
from loraplex_client.adapter_manifest import read_manifest
from loraplex_client.cli.context import StoreTarget, connect, stdout


def apply(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Option(
            "--file", "-f", help="YAML; docs/live-adapters.md has an example.", metavar="FILE", show_default=False
        ),
    ],
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete adapters that the file does not name, and labels that it lacks.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    store_target: StoreTarget = None,
) -> None:
    """Bring adapters and labels to what a file says; done twice, the second time changes nothing."""

    def say(step: str) -> None:
        stdout.print(f"{'would: ' if dry_run else ''}{step}", soft_wrap=True)

    wanted = read_manifest(file)
    with connect(context, store_target=store_target) as client:
        if not Applier(client.adapters, say, is_dry=dry_run, prunes=prune).apply(wanted):
            stdout.print("nothing to do")
