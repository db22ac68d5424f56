"""Pages of the reference that are made from docstrings and from `--help`."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import typer
import typer.core
import typer.main
from loraplex_client.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT: Final = """# Python client

::: loraplex_client
"""
ERRORS: Final = """# Classes of errors

What each means, and what to do about it: [errors](../errors.md).

::: loraplex_common.errors
"""
WIDTH: Final = 110
SERVICES: Final = ("loraplex_gateway", "loraplex_engine", "loraplex_adapter_store")


def commands_page() -> str:
    """Return the page of commands and flags, as the programs themselves print them."""
    root = typer.main.get_command(app)
    blocks = [f"## {path}\n\n```text\n{text}\n```" for path, text in _client_help(root, "loraplex", None)]
    blocks += [f"## {module}\n\n```text\n{_service_help(module)}\n```" for module in SERVICES]
    return "# Commands and flags\n\n" + "\n\n".join(blocks) + "\n"


def _client_help(command: Any, path: str, parent: typer.Context | None) -> Iterator[tuple[str, str]]:
    context = typer.Context(
        command, info_name=path.split()[-1], parent=parent, terminal_width=WIDTH, max_content_width=WIDTH
    )
    yield path, command.get_help(context).strip()
    for name, sub in (command.commands if isinstance(command, typer.core.TyperGroup) else {}).items():
        if not sub.hidden:
            yield from _client_help(sub, f"{path} {name}", context)


def _service_help(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env={**os.environ, "COLUMNS": str(WIDTH)}
    )
    return done.stdout.strip()
