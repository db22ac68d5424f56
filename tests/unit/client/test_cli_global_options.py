"""Options that every command takes, before its name and after it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import loraplex_client
import pytest

if TYPE_CHECKING:
    from support.cli_runner import Runner
    from support.gateway_double import GatewayDouble

REACH_NOBODY = [(), ("serve",), ("plan",), ("fetch-model",)]
COMMANDS = [
    *[(), ("serve",), ("generate",), ("chat",), ("status",), ("plan",), ("load",), ("fetch-model",), ("adapters",)],
    *[("adapters", name) for name in ("import", "list", "show", "alias", "delete", "prefetch", "evict", "make-random")],
]


def test_the_list_of_commands_is_whole(loraplex: Runner) -> None:
    shown = loraplex("--help").out + loraplex("adapters", "--help").out

    listed = set(re.findall(r"^  ([a-z][a-z-]*) {2,}[A-Z]", shown, re.MULTILINE))
    assert listed == {name for command in COMMANDS for name in command}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_says_its_version(loraplex: Runner, command: tuple[str, ...]) -> None:
    result = loraplex(*command, "--version")

    assert (result.code, result.out) == (0, f"loraplex {importlib.metadata.version('loraplex')}\n")


@pytest.mark.parametrize("module", ["loraplex_gateway", "loraplex_engine", "loraplex_adapter_store"])
def test_every_service_says_its_version(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)

    name = module.replace("_", "-")
    assert (result.returncode, result.stdout) == (0, f"{name} {importlib.metadata.version('loraplex')}\n")


def test_the_library_says_its_version() -> None:
    assert loraplex_client.__version__ == importlib.metadata.version("loraplex")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--api-key", "secret", "generate", "Once"),
        ("generate", "--api-key", "secret", "Once"),
        ("generate", "Once", "--api-key=secret"),
        ("--api-key", "other", "generate", "Once", "--api-key", "secret"),
    ],
)
def test_an_api_key_is_taken_before_the_command_and_after_it(
    loraplex: Runner, gateway: GatewayDouble, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEY", "of the environment")

    assert loraplex(*arguments).code == 0
    assert gateway.metadata[-1]["authorization"] == "Bearer secret"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in REACH_NOBODY], ids=" ".join)
def test_every_command_that_calls_servers_takes_credentials(loraplex: Runner, command: tuple[str, ...]) -> None:
    shown = loraplex(*command, "--help").out

    assert all(flag in shown for flag in ("--api-key", "--tls-ca", "--tls-cert", "--tls-key"))
