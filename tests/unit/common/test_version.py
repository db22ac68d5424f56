"""The version is the installed package's, written in pyproject.toml alone."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from loraplex_common.version import NOT_INSTALLED, package_version

ROOT = Path(__file__).resolve().parents[3]


def test_the_version_is_that_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert package_version() == project["version"]


def test_sources_that_are_not_installed_say_so_and_run() -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'services/common')!r}); from loraplex_common import version; "

    # Isolated and without site-packages: nothing is installed.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script + "print(version.package_version())"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout, done.stderr) == (f"{NOT_INSTALLED}\n", "")
