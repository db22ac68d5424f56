"""``loraplex fetch-model``: a base model of the hub, or the demo's."""

from pathlib import Path
from typing import Annotated

import typer
from loraplex_common.hub_base import fetch_hub_base

from loraplex_client.cli.context import progress_bars, stderr
from loraplex_client.demo import ensure_demo_model


def fetch_model(
    name: Annotated[
        str | None,
        typer.Argument(help="Repository of the hub (default: the demo's base model).", metavar="ORG/NAME[@COMMIT]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to create (default: below the cache).", metavar="DIR")
    ] = None,
) -> None:
    """Fetch a base model, if that has not been done; print where it lies. Without a name: the demo's, converted."""
    print(ensure_with_progress(out) if name is None else fetch_and_tell(name, out))


def ensure_with_progress(out: Path | None = None) -> Path:
    """Return the demo's base model, showing bars while it is fetched and converted."""
    with progress_bars() as update:
        return ensure_demo_model(update, out_dir=out)


def fetch_and_tell(name: str, out: Path | None = None) -> Path:
    """Return the directory of a base model of the hub, having said on stderr which commit it is of."""
    directory, commit = fetch_hub_base(name, out_dir=out)
    stderr.print(f"{name.partition('@')[0]} at commit {commit}", style="dim", soft_wrap=True)
    return directory
