"""What all commands share: where the servers are, which credentials they are shown, how progress is shown."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from loraplex_client._servers import Credentials, Servers, read_key
from loraplex_client._sync.client import Client

PIPE_WIDTH: Final = 400
# Tables in a pipe are for programs: nothing is cut to fit a screen.
# Every text is printed as it stands: callers choose names, and may write brackets and colons in them.
stdout = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)

Target = Annotated[
    str | None,
    typer.Option(
        envvar="LORAPLEX_TARGET",
        help="The gateway's gRPC address, several with commas (default: the profile's, else 127.0.0.1:8500).",
        metavar="HOST:PORT",
    ),
]
StoreTarget = Annotated[
    str | None,
    typer.Option(
        envvar="LORAPLEX_STORE_TARGET",
        help="The adapter store's gRPC address (default: the profile's, else the gateway's host, port 8510).",
        metavar="HOST:PORT",
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Options given before the command or after it; after it counts."""

    profile: Path | None = None
    api_key_file: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


def identity_of(context: typer.Context) -> tuple[Credentials, Path | None]:
    """Return what we prove ourselves with, and the profile's file, once all options are read.

    Raises:
        BadParameter: If a part of a client certificate is missing, or the environment names two API keys.
        ProfileError: If the API key's file cannot be used.
    """
    found: Identity = context.obj
    if (found.tls_cert is None) != (found.tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key belong together: give both or neither")
    credentials = Credentials(
        api_key=_api_key(found.api_key_file), tls_ca=found.tls_ca, tls_cert=found.tls_cert, tls_key=found.tls_key
    )
    return credentials, found.profile


def _api_key(file: Path | None) -> str | None:
    """Return the API key of the option, else of the environment: a key on a command line shows in every process list."""
    if file is not None:
        return read_key(file)
    key, name = os.environ.get("LORAPLEX_API_KEY"), os.environ.get("LORAPLEX_API_KEY_FILE")
    if key and name:
        raise typer.BadParameter("LORAPLEX_API_KEY and LORAPLEX_API_KEY_FILE are both set: which of the two counts?")
    return read_key(Path(name).expanduser()) if name else key or None


def servers_of(context: typer.Context, target: str | None = None, store_target: str | None = None) -> Servers:
    """Return which servers are called with what."""
    credentials, profile = identity_of(context)
    try:
        return Servers(target, store_target, credentials=credentials, profile=profile)
    except ValueError as error:
        raise typer.BadParameter(str(error).replace("tls_", "--tls-")) from error


def connect(context: typer.Context, target: str | None = None, store_target: str | None = None) -> Client:
    """Open a client with the credentials given; commands without an option for the gateway go by the environment."""
    target = target or os.environ.get("LORAPLEX_TARGET") or None
    credentials, profile = identity_of(context)
    try:
        return Client(
            target,
            store_target=store_target,
            api_key=credentials.api_key,
            tls_ca=credentials.tls_ca,
            tls_cert=credentials.tls_cert,
            tls_key=credentials.tls_key,
            profile=profile,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error).replace("tls_", "--tls-")) from error
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar per task on stderr; yields ``update(task, bytes done, bytes expected)``, 0 expected for unknown."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr) as progress:
        tasks = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=None)
            progress.update(tasks[name], completed=done, total=total or None)

        yield update


def warn_of_late_gateways(gateways: Sequence[str]) -> None:
    """Say which gateways do not serve a change yet."""
    if gateways:
        late = ", ".join(gateways)
        stderr.print(f"warning: not yet served by {late}: requests there may still be refused", soft_wrap=True)
