"""``loraplex fetch-model``: the demo's base model."""

from pathlib import Path
from typing import Annotated

import typer

from loraplex_client.cli.context import progress_bars
from loraplex_client.demo import ensure_demo_model


def fetch_model(
    out: Annotated[
        Path | None, typer.Option(help="Directory to create (default: below the cache).", metavar="DIR")
    ] = None,
) -> None:
    """Fetch and convert the demo's base model, if that has not been done; print where it lies."""
    print(ensure_with_progress(out))


def ensure_with_progress(out: Path | None = None) -> Path:
    """Return the demo's base model, showing bars while it is fetched and converted."""
    with progress_bars() as update:
        return ensure_demo_model(update, out_dir=out)
