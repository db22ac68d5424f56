"""A stack with the demo's model, and the Python that has the client libraries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.demo_model import REPOSITORY
from support.stack_fixtures import smol_stack

__all__ = ["clients_python", "smol_stack"]

collect_ignore = ["libraries"]  # test_libraries.py runs those, by the interpreter below


@pytest.fixture(scope="session")
def clients_python() -> Path:
    """The interpreter of the environment that `make test-clients` makes."""
    folder = Path(os.environ.get("LORAPLEX_CLIENTS_VENV", REPOSITORY / ".venv-clients"))
    python = folder / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs client libraries in {folder}: make test-clients installs them")
    return python
