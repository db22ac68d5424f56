"""What all commands share: where the servers are, who we are, how progress is shown."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from loraplex_client._client import Client
from loraplex_client._connection import DEFAULT_TARGET

PIPE_WIDTH: Final = 400
# Tables in a pipe are for programs: nothing is cut to fit a screen.
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False)

Target = Annotated[
    str,
    typer.Option(
        envvar="LORAPLEX_TARGET", help="The gateway's gRPC address; several with commas.", metavar="HOST:PORT"
    ),
]
StoreTarget = Annotated[
    str | None,
    typer.Option(
        envvar="LORAPLEX_STORE_TARGET",
        help="The adapter store's gRPC address (default: the gateway's host, port 8510).",
        metavar="HOST:PORT",
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """Options given before the command or after it; after it counts."""

    api_key: str | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


def credentials_of(context: typer.Context) -> Credentials:
    """Return who we are, once all options are read.

    Raises:
        BadParameter: If a part of a client certificate is missing.
    """
    found: Credentials = context.obj
    if (found.tls_cert is None) != (found.tls_key is None) or (found.tls_cert is not None and found.tls_ca is None):
        raise typer.BadParameter("--tls-cert needs --tls-key and --tls-ca")
    return found


def connect(context: typer.Context, target: str = DEFAULT_TARGET, store_target: str | None = None) -> Client:
    """Open a client with the credentials given."""
    credentials = credentials_of(context)
    try:
        return Client(
            target,
            store_target=store_target,
            api_key=credentials.api_key,
            tls_ca=credentials.tls_ca,
            tls_cert=credentials.tls_cert,
            tls_key=credentials.tls_key,
        )
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar per task on stderr; yields ``update(task, bytes done, bytes expected)``, 0 expected for unknown."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
    with Progress(*columns, console=stderr) as progress:
        tasks = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=None)
            progress.update(tasks[name], completed=done, total=total or None)

        yield update
