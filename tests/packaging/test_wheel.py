"""What `make dist` builds: installed with one extra into a new environment it is a client of a served model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.base_models import TinyBase, write_base_model
from support.serve_process import SMALL, ServeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
NO_INDEX = re.compile(r"error sending request|Failed to fetch|dns error|Could not connect", re.IGNORECASE)


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make dist` fills."""
    folder = tmp_path_factory.mktemp("release") / "dist"
    done = run(sys.executable, "deploy/dist.py", "--no-audit", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def client_only(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that has the wheel with its extra `client`, and nothing of this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    (wheel,) = dist.glob("*.whl")
    python = folder / "bin" / "python"
    command = ("-m", "uv", "pip", "install", "--system-certs", "-q", "--python", python, "-c", "constraints.txt")
    done = run(sys.executable, *command, f"{wheel}[client]")
    if done.returncode and NO_INDEX.search(done.stderr):
        pytest.skip(f"no package index can be reached: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("served")
    model = write_base_model(folder / "tiny", TinyBase())
    stack = ServeProcess(folder / "data", "--model", str(model), *SMALL)
    yield stack
    stack.close()


def test_a_client_without_torch_calls_a_served_model(client_only: Path, served: ServeProcess) -> None:
    program = f"""
import importlib.util, json
from loraplex_client import Client
with Client({served.grpc!r}) as client:
    answer = client.generate_once(prompt_token_ids=[5, 6, 7], max_new_tokens=4, ignore_eos=True)
print(json.dumps([len(answer.token_ids), importlib.util.find_spec("torch") is None]))
"""

    in_python = run(client_only / "python", "-I", "-c", program, cwd=client_only)
    on_command_line = run(client_only / "loraplex", "status", "--target", served.grpc, cwd=client_only)

    assert (in_python.returncode, in_python.stderr) == (0, "")
    assert json.loads(in_python.stdout) == [4, True]
    assert on_command_line.returncode == 0, on_command_line.stderr


def test_the_command_says_the_version_and_the_commit_that_were_built(client_only: Path, dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    head = run("git", "rev-parse", "--short=12", "HEAD").stdout.strip()

    shown = run(client_only / "loraplex", "--version", cwd=client_only).stdout

    assert re.fullmatch(rf"loraplex {re.escape(wheel.name.split('-')[1])} \(commit {head}(-dirty)?\)\n", shown)


def test_a_part_that_was_not_installed_names_the_extra(client_only: Path, tmp_path: Path) -> None:
    model = write_base_model(tmp_path / "tiny", TinyBase())
    flags = ("--base-port", "0", "--data-dir", tmp_path / "data")

    done = run(client_only / "loraplex", "serve", "--model", model, *flags, cwd=client_only)

    assert done.returncode == 1
    assert "pip install 'loraplex[" in done.stderr


def test_the_bill_of_materials_lists_what_the_services_install(dist: Path) -> None:
    (bill,) = dist.glob("*.cdx.json")
    listed = {part["name"]: part for part in json.loads(bill.read_text())["components"]}

    assert {"torch", "grpcio", "tokenizers", "obstore"} <= listed.keys()
    assert all("version" in part for part in listed.values())


@pytest.mark.parametrize(("tag", "version"), [("v9.8.7", r"9\.8\.7"), (None, r"0\.1(\.0)?\.dev\d+\+g[0-9a-f]+")])
def test_the_version_is_that_of_the_tag_and_without_one_it_still_builds(
    tmp_path: Path, tag: str | None, version: str
) -> None:
    assert run("git", "clone", "-q", "--no-tags", ROOT, tmp_path / "clone").returncode == 0
    if tag:
        assert run("git", "tag", tag, cwd=tmp_path / "clone").returncode == 0

    done = run(sys.executable, "-m", "hatchling", "version", cwd=tmp_path / "clone")

    assert re.fullmatch(version, done.stdout.strip()), done.stderr


def test_sources_without_git_build(tmp_path: Path) -> None:
    archive = subprocess.run(
        ["git", "archive", "HEAD", "pyproject.toml", "deploy", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}

    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout.strip()) == (0, "0.1.0.dev0"), done.stderr
