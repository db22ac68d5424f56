"""Options that every command takes, before its name and after it: ``--version``, and the caller's credentials."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from loraplex_common.version import version_line

from loraplex_client.cli.context import Identity


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(version_line("loraplex"))
        raise typer.Exit


# Typer has no options that hold for all commands. These are appended to the commands' own parameters.
VERSION: Final = {
    "version": Annotated[
        bool,
        typer.Option("--version", help="Print version and commit, and end.", is_eager=True, callback=_print_version),
    ]
}
CREDENTIALS: Final = {
    "profile": (Path, "Client profile: where the servers are and what to prove oneself with."),
    "api_key_file": (Path, "File with the API key sent with every call (or LORAPLEX_API_KEY, LORAPLEX_API_KEY_FILE)."),
    "tls_ca": (Path, "Certificates to trust, PEM; turns TLS on."),
    "tls_cert": (Path, "Client certificate, PEM, for mutual TLS."),
    "tls_key": (Path, "Key of the client certificate, PEM."),
}
"""Name -> type, help. The environment (``LORAPLEX_TLS_CA``, ...) counts before the command only: after it, it would beat
what was given before."""

Command = Callable[..., None]


def local(command: Command) -> Command:
    """Let a command that calls no server take ``--version``."""
    return _extended(command, VERSION)


def remote(command: Command) -> Command:
    """Let a command that calls servers take ``--version`` and the credentials; its first parameter is the context."""
    return _with_credentials(command, reads_environment=False)


def root(command: Command) -> Command:
    """As `remote`, for what stands before all commands."""
    return _with_credentials(command, reads_environment=True)


def _with_credentials(command: Command, *, reads_environment: bool) -> Command:
    options = {
        name: Annotated[
            kind | None,
            typer.Option(help=text, envvar=_variable(name) if reads_environment else None, metavar="FILE"),
        ]
        for name, (kind, text) in CREDENTIALS.items()
    }

    @functools.wraps(command)
    def with_credentials(context: typer.Context, **arguments: Any) -> None:
        given = {name: value for name in options if (value := arguments.pop(name)) is not None}
        context.obj = replace(context.obj or Identity(), **given)
        command(context, **arguments)

    return _extended(with_credentials, options | VERSION)


def _variable(name: str) -> str | None:
    """Return the variable of an option; `context` reads those of the API key, of which there are two."""
    return None if name == "api_key_file" else f"LORAPLEX_{name.upper()}"


def _extended(command: Command, options: dict[str, Any]) -> Command:
    """Return a command that shows further parameters to typer; those of `VERSION` stay here."""

    @functools.wraps(command)
    def extended(*positional: Any, **arguments: Any) -> None:
        command(*positional, **{name: value for name, value in arguments.items() if name not in VERSION})

    own = inspect.signature(command)
    defaults = {name: False if name in VERSION else None for name in options}
    further = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
        for name, hint in options.items()
    ]
    signature = own.replace(parameters=[*own.parameters.values(), *further])
    extended.__signature__ = signature  # type: ignore[attr-defined]
    extended.__annotations__ = {**command.__annotations__, **options}
    return extended
