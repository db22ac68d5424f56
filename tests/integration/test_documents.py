"""Every command and program in the documents runs against a stack as `make serve` makes it, with a tiny model in the demo's place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.documents import (
    DOCUMENTS,
    EXAMPLES,
    LANGUAGES,
    NO_PROGRAMS,
    ROOT,
    Snippet,
    fences,
    lines_marked,
    lines_of_tools,
    marked_blocks,
    problem_with,
    snippets,
)
from support.serve_process import SMALL, ServeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration

HERE = "tests/integration/test_documents.py"
CI = ".ci/run"
CONTAINERS = "tests/compose/test_compose_stack.py"
SERVE = "tests/integration/test_cli_serve.py"
BACKUP = "tests/integration/test_valkey_backup.py"
NOTHING = "nothing: "
ELSEWHERE = {
    "make serve": SERVE,
    "make test": CI,
    "loraplex serve --model DIR": SERVE,
    "loraplex serve --demo --ui": SERVE,
    "docker compose up --build --wait": CONTAINERS,
    "docker compose --profile demo run --rm demo-adapters": CONTAINERS,
    "docker compose up --build --wait --scale engine=2": CONTAINERS,
    "docker compose --profile observe up --build --wait": f"{NOTHING}needs Docker",
    "docker compose cp credentials:/credentials/admin ./admin": f"{NOTHING}needs Docker",
    "docker compose --profile ranks up --build --wait --scale engine=0": "tests/unit/deploy/test_compose_file.py",
    "docker compose --profile gpu up --build --wait --scale engine=0": f"{NOTHING}needs Docker and a GPU",
    "make .venv/.dev-installed": CI,
    "LORAPLEX_SMOKE_TARGET=127.0.0.1:8500 LORAPLEX_SMOKE_HTTP=127.0.0.1:8501 .venv/bin/pytest tests/smoke": (
        "tests/integration/test_golden.py"
    ),
    "grpcurl -plaintext 127.0.0.1:8500 list": SERVE,
    """grpcurl -plaintext -d '{"text": "Hello", "stopping": {"max_new_tokens": 8}}' 127.0.0.1:8500 """
    "loraplex.v1.GatewayService/Generate": SERVE,
    "loraplex usage --redis-url redis://valkey:6379 --since 24h --by tenant --by adapter": (
        "tests/integration/test_usage_ledger.py"
    ),
    "loraplex usage --redis-url redis://valkey:6379 --since 30d --by tenant --json": "tests/integration/test_usage_ledger.py",
    "loraplex serve --model DIR --engines 2": "tests/integration/test_serve_engines.py",
    "loraplex serve --model DIR --engines 8 --device cuda": "nothing: needs several GPUs",
    "pip install openai": CI,
    "make dist": "tests/packaging/test_wheel.py",
    **{line: f"{NOTHING}needs {tool}" for line, tool in lines_of_tools(ROOT / "docs" / "benchmarking.md").items()},
    **dict.fromkeys(lines_marked(ROOT / "docs" / "operating.md", BACKUP), BACKUP),
}
"""Command that is not run here -> the file that runs it, or what it does; its flags, files and targets are checked here."""
COMMAND_TIMEOUT_S = 120
EVERYTHING = [snippet for path in (*DOCUMENTS, *EXAMPLES) for snippet in snippets(path)]


class Reader:
    """A reader that follows the documents, in a folder that has what a checkout has."""

    def __init__(self, folder: Path, stack: ServeProcess) -> None:
        self._folder = folder
        self._addresses = {
            8500: stack.grpc,
            8501: stack.http,
            8502: stack.metrics,
            8510: stack.store,
            8520: stack.engine,
        }
        self._environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LORAPLEX_TARGET": stack.grpc,
            "LORAPLEX_STORE_TARGET": stack.store,
        }
        for example in EXAMPLES:
            (folder / "examples" / example.name).write_text(self._at_the_stack(example.read_text()))

    def follow(self, snippet: Snippet) -> str | None:
        """Run a snippet; return how it failed."""
        text = self._at_the_stack(snippet.text)
        command = ["bash", "-c", text] if snippet.kind == "shell" else [sys.executable, "-c", text]
        began = time.monotonic()
        done = subprocess.run(
            command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
        )
        print(f"{time.monotonic() - began:5.1f} s  {snippet.where}: {snippet.text.splitlines()[0]}")
        if done.returncode:
            return f"{snippet.where}: {snippet.text}\nexit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return None

    def _at_the_stack(self, text: str) -> str:
        return re.sub(
            r"(127\.0\.0\.1|localhost):(\d{4})", lambda match: self._addresses.get(int(match[2]), match[0]), text
        )


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A reader beside a running demo: the tiny model lies in the cache, its adapters where the demo's are."""
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    base = TinyBase(vocab_size=32_000, max_position_embeddings=1024)  # `loraplex load` draws ids below 32,000
    model = write_base_model(tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct", base)
    folder = tmp_path / "checkout"
    for seed, directory in enumerate(sorted((ROOT / "examples" / "demo" / "adapters").iterdir())):
        write_adapter(folder / "examples" / "demo" / "adapters" / directory.name, model, Recipe(rank=4, seed=seed))
    write_adapter(folder / "my-peft-adapter", model, Recipe(rank=2))
    (folder / "proto").symlink_to(ROOT / "proto")
    protoc = folder / "bin" / "protoc"  # the real one, which grpcio-tools has as a module
    protoc.parent.mkdir()
    protoc.write_text(f'#!/bin/sh\nexec {sys.executable} -m grpc_tools.protoc "$@"\n')
    protoc.chmod(0o755)
    flags = ("--demo", "--demo-dir", str(folder / "examples" / "demo"), *SMALL)
    stack = ServeProcess(tmp_path / "data", *flags)
    yield Reader(folder, stack)
    stack.close()
    shutil.rmtree(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_and_program_of_the_documents_runs(reader: Reader) -> None:
    runs_here = (snippet for snippet in EVERYTHING if snippet.kind != "inline" and snippet.text not in ELSEWHERE)
    wanted = {snippet.text: snippet for snippet in reversed(list(runs_here))}  # what two documents say runs once

    failures = [failure for snippet in reversed(wanted.values()) if (failure := reader.follow(snippet)) is not None]

    assert failures == [], "\n\n".join(failures)
    assert len(wanted) >= 15


@pytest.mark.parametrize(
    "command",
    sorted({s.text for s in EVERYTHING if s.kind == "inline" or ELSEWHERE.get(s.text, BACKUP) != BACKUP}),
    ids=str,
)
def test_a_command_that_is_only_named_has_its_flags_files_and_targets(command: str) -> None:
    assert problem_with(command) is None


def test_every_command_that_is_not_run_is_still_in_a_document() -> None:
    assert ELSEWHERE.keys() <= {snippet.text for snippet in EVERYTHING}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_says_what_it_is(path: Path) -> None:
    unknown = [
        f"line {line}: {language!r}" for line, language, _ in fences(path) if language not in {*LANGUAGES, *NO_PROGRAMS}
    ]

    assert unknown == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_note_above_a_block_says_what_runs_its_commands(path: Path) -> None:
    wrong = [
        f"line {block.line}: says {block.runners}, is run by {sorted(runners)}"
        for block in marked_blocks(path)
        if set(block.runners) != (runners := {ELSEWHERE.get(command, HERE) for command in block.commands})
    ]

    assert wrong == []


def test_what_runs_commands_is_there() -> None:
    files = {runner for runner in ELSEWHERE.values() if not runner.startswith(NOTHING)}

    assert {file for file in files if not (ROOT / file).is_file()} == set()
