"""The version is the installed package's, made of git's tags; a checkout and a wheel know their commit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from loraplex_common.version import NOT_INSTALLED, UNKNOWN_COMMIT, package_commit, version_line

ROOT = Path(__file__).resolve().parents[3]


def test_a_checkout_says_the_commit_of_its_head() -> None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    commit = package_commit()

    assert done.stdout.startswith(commit) if done.returncode == 0 else commit == UNKNOWN_COMMIT
    assert version_line("loraplex").endswith(f" (commit {commit})")


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
