"""The version of this build and the commit it was made from; the version is written in one place, git's tags."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Final

DISTRIBUTION: Final = "loraplex"
NOT_INSTALLED: Final = "0+not.installed"
UNKNOWN_COMMIT: Final = "unknown"
_COMMIT_FILE: Final = Path(__file__).parent / "COMMIT"
"""What deploy/build_hook.py writes into a wheel."""
_CHECKOUT: Final = Path(__file__).resolve().parents[3]


@functools.cache
def package_version() -> str:
    """Return the version of the installed package, e.g. ``0.1.0``; `NOT_INSTALLED` for sources on the path alone."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


@functools.cache
def package_commit() -> str:
    """Return the commit that this code is of, 12 hex digits; `UNKNOWN_COMMIT` where nothing says it.

    A wheel has it from its build, with ``-dirty`` behind it if the checkout had changes. A checkout is asked for its head.
    """
    if _COMMIT_FILE.is_file():
        return _COMMIT_FILE.read_text().strip() or UNKNOWN_COMMIT
    if not (_CHECKOUT / ".git").exists():
        return UNKNOWN_COMMIT
    command = ["git", "-C", str(_CHECKOUT), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or one that hangs: the commit is not worth a failed start
        return UNKNOWN_COMMIT
    return done.stdout.strip() or UNKNOWN_COMMIT


def version_line(program: str) -> str:
    """Return what ``--version`` prints: program, version and commit."""
    return f"{program} {package_version()} (commit {package_commit()})"
