"""Options that every command takes, before its name and after it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import loraplex_client
import pytest
from loraplex_common.version import version_line

if TYPE_CHECKING:
    from pathlib import Path

    from support.cli_runner import Runner
    from support.gateway_double import GatewayDouble

REACH_NOBODY = [
    *[(), ("serve",), ("plan",), ("fetch-model",)],
    *[("credentials",), ("credentials", "make"), ("credentials", "show")],
]
COMMANDS = [
    *[
        (),
        ("serve",),
        ("generate",),
        ("chat",),
        ("status",),
        ("plan",),
        ("load",),
        ("fetch-model",),
        ("adapters",),
        ("top",),
        ("usage",),
    ],
    *[("credentials",), ("credentials", "make"), ("credentials", "show")],
    *[
        ("adapters", name)
        for name in (
            "import",
            "list",
            "show",
            "alias",
            "delete",
            "prefetch",
            "evict",
            "make-random",
            "apply",
            "push",
            "labels",
            "history",
            "rollback",
        )
    ],
]


def test_the_list_of_commands_is_whole(loraplex: Runner) -> None:
    shown = "".join(loraplex(*group, "--help").out for group in ((), ("adapters",), ("credentials",)))

    listed = set(re.findall(r"^  ([a-z][a-z-]*) {2,}[A-Z]", shown, re.MULTILINE))
    assert listed == {name for command in COMMANDS for name in command}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_says_its_version(loraplex: Runner, command: tuple[str, ...]) -> None:
    result = loraplex(*command, "--version")

    assert (result.code, result.out) == (0, version_line("loraplex") + "\n")


@pytest.mark.parametrize("module", ["loraplex_gateway", "loraplex_engine", "loraplex_adapter_store"])
def test_every_service_says_its_version(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)

    name = module.replace("_", "-")
    assert (result.returncode, result.stdout) == (0, version_line(name) + "\n")


def test_the_library_says_its_version() -> None:
    assert loraplex_client.__version__ == importlib.metadata.version("loraplex")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--api-key-file", "secret", "generate", "Once"),
        ("generate", "--api-key-file", "secret", "Once"),
        ("generate", "Once", "--api-key-file=secret"),
        ("--api-key-file", "other", "generate", "Once", "--api-key-file", "secret"),
    ],
)
def test_an_api_key_is_taken_before_the_command_and_after_it(
    loraplex: Runner,
    gateway: GatewayDouble,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("secret", "other"):
        (tmp_path / name).write_text(f"{name}\n")
    monkeypatch.setenv("LORAPLEX_API_KEY", "of the environment")

    assert loraplex(*arguments).code == 0
    assert gateway.metadata[-1]["authorization"] == "Bearer secret"


def test_a_key_on_the_command_line_is_refused(loraplex: Runner) -> None:
    result = loraplex("--api-key", "secret", "generate", "Once")

    assert result.code == 2
    assert "secret" not in result.err


def test_the_environment_has_the_key_or_names_its_file(
    loraplex: Runner, gateway: GatewayDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEY", "in the environment")
    loraplex("generate", "Once")
    (tmp_path / "key").write_text("in-a-file\n")
    monkeypatch.setenv("LORAPLEX_API_KEY_FILE", str(tmp_path / "key"))
    both = loraplex("generate", "Once")
    monkeypatch.delenv("LORAPLEX_API_KEY")
    loraplex("generate", "Once")

    assert [call["authorization"] for call in gateway.metadata] == ["Bearer in the environment", "Bearer in-a-file"]
    assert both.code == 2
    assert "are both set" in both.err


@pytest.mark.parametrize(
    ("text", "problem"), [("", "expected one line"), ("a\nb", "expected one line"), (None, "No such file")]
)
def test_a_file_without_a_key_is_named(loraplex: Runner, tmp_path: Path, text: str | None, problem: str) -> None:
    if text is not None:
        (tmp_path / "key").write_text(text)

    result = loraplex("--api-key-file", str(tmp_path / "key"), "generate", "Once")

    assert result.code == 1
    assert problem in result.err
    assert str(tmp_path / "key") in result.err


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in REACH_NOBODY], ids=" ".join)
def test_every_command_that_calls_servers_takes_credentials(loraplex: Runner, command: tuple[str, ...]) -> None:
    shown = loraplex(*command, "--help").out

    assert all(flag in shown for flag in ("--profile", "--api-key-file", "--tls-ca", "--tls-cert", "--tls-key"))
