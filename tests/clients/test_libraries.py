"""Client libraries of others work unchanged against the demo: the tests of each run in an environment that has it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.stack_fixtures import import_all

if TYPE_CHECKING:
    from support.stack import Stack

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(420)]

FOLDER = Path(__file__).parent
PYTHON_TESTS = sorted((FOLDER / "libraries").glob("test_*.py"))
NPM_TESTS = sorted((FOLDER / "npm").glob("*.test.js"))
TIMEOUT_S = 400


@pytest.fixture(scope="module")
def environment(smol_stack: Stack) -> dict[str, str]:
    """What the tests of a library find in their environment; the stack serves the demo's adapters."""
    import_all(smol_stack)
    url = f"http://{smol_stack.gateway.addresses['http']}/v1"
    no_reports = {"DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "1"}
    return {**os.environ, **no_reports, "LORAPLEX_URL": url, "AI_SDK_LOG_WARNINGS": "false"}


@pytest.fixture(scope="module")
def node(clients_python: Path) -> str:
    """The program that runs JavaScript; a machine without it, or where npm's packages were not asked for, runs none."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs node, which runs the client libraries of npm; install Node.js 20 or newer")
    assert (FOLDER / "npm" / "node_modules").is_dir(), "make test-clients installs the client libraries of npm"
    return program


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )

    assert result.returncode == 0, f"{result.stdout[-12000:]}\n{result.stderr[-4000:]}"


@pytest.mark.parametrize("file", PYTHON_TESTS, ids=lambda file: file.stem.removeprefix("test_"))
def test_a_python_library_works_unchanged(file: Path, clients_python: Path, environment: dict[str, str]) -> None:
    run([str(clients_python), "-m", "pytest", "-q", "--tb=short", file.name], file.parent, environment)


@pytest.mark.parametrize("file", NPM_TESTS, ids=lambda file: file.name.removesuffix(".test.js"))
def test_an_npm_library_works_unchanged(file: Path, node: str, environment: dict[str, str]) -> None:
    run([node, "--test", "--test-reporter=spec", file.name], file.parent, environment)
