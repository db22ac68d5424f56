"""The stack of compose.yaml in real containers: sealed, sharing memory, and whole again after any of them is killed.

``make test-compose`` starts it and runs this; skipped without ``LORAPLEX_COMPOSE``, the command that runs compose.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex_client import AsyncClient, Finished
from loraplex_common.errors import LoraplexError
from support.waiting import eventually

COMPOSE = shlex.split(os.environ.get("LORAPLEX_COMPOSE", ""))
DOCKER = shlex.split(os.environ.get("LORAPLEX_DOCKER", "docker"))
ROOT = Path(__file__).resolve().parents[2]
TARGET = f"127.0.0.1:{os.environ.get('GRPC_PORT', '8500')}"
SERVICES = ("gateway", "adapter_store", "engine", "valkey")
STREAMS = 3

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not COMPOSE, reason="no containers: LORAPLEX_COMPOSE is not set"),
]


def compose(*arguments: str) -> str:
    """Run a command of compose and return what it prints."""
    done = subprocess.run([*COMPOSE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


def kill_and_start(service: str) -> None:
    """Kill one container of a service, and start it again as an operator or a restart policy would."""
    container = compose("ps", "--quiet", service).split()[0]
    for verb in ("kill", "start"):
        subprocess.run([*DOCKER, verb, container], check=True, capture_output=True, timeout=60)


def golden_cases() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((ROOT / "examples" / "demo" / "golden.json").read_text())["cases"]
    return cases


class Load:
    """Streams that begin anew until they are told to end; each must have its golden tokens.

    Args:
        client: Client that asks.
        has_gap: Whether the stack's only gateway goes away: a call that no gateway has taken yet is then asked again. One that
            had begun still must end as if nothing had been.
    """

    def __init__(self, client: AsyncClient, *, has_gap: bool) -> None:
        self._client = client
        self._has_gap = has_gap
        self._is_over = asyncio.Event()
        self.num_done = 0
        self.faults: list[str] = []

    async def run(self) -> None:
        cases = golden_cases()
        async with asyncio.TaskGroup() as group:
            for first in range(STREAMS):
                group.create_task(self._stream(cases[first:] + cases[:first]))

    async def _stream(self, cases: list[dict[str, Any]]) -> None:
        while not self._is_over.is_set():
            for case in cases:
                if self._is_over.is_set():
                    return
                await self._one(case)

    async def _one(self, case: dict[str, Any]) -> None:
        tokens: list[int] = []
        has_begun = False
        stream = self._client.generate(
            prompt_token_ids=case["prompt_ids"], adapter=case["adapter"], temperature=0, max_new_tokens=40
        )
        try:
            async for event in stream:
                has_begun = True
                tokens.extend(event.token_ids)
                if (
                    isinstance(event, Finished)
                    and event.stop_token_id is not None
                    and tokens[-1:] != [event.stop_token_id]
                ):
                    tokens.append(event.stop_token_id)
        except LoraplexError as error:
            if self._has_gap and not has_begun and error.code is grpc.StatusCode.UNAVAILABLE:
                await asyncio.sleep(0.2)  # a client's pause between attempts
                return
            self.faults.append(f"{error.reason} after {len(tokens)} tokens of {case['adapter']}: {error}")
            return
        self.num_done += 1
        if tokens != case["token_ids"]:
            self.faults.append(f"other tokens than the golden ones with {case['adapter']}")

    async def more(self, number: int) -> None:
        """Wait until so many further streams are done."""
        goal = self.num_done + number
        await eventually(lambda: self.num_done >= goal or bool(self.faults), timeout_s=120)

    def end(self) -> None:
        self._is_over.set()


@pytest.mark.parametrize("service", SERVICES)
async def test_no_stream_fails_when_a_container_is_killed_and_comes_back(service: str) -> None:
    async with AsyncClient(TARGET) as client:
        load = Load(client, has_gap=service == "gateway")
        running = asyncio.create_task(load.run())
        await load.more(STREAMS)

        await asyncio.to_thread(kill_and_start, service)
        await load.more(2 * STREAMS)

        load.end()
        await running

    assert load.faults[:5] == []


def test_store_and_engines_share_memory_and_each_engine_has_a_name_of_its_own() -> None:
    lines = compose("logs", "--no-log-prefix", "engine").splitlines()

    assert [line for line in lines if "attached to adapter store" in line and "shared_memory=[False]" in line] == []
    assert any("attached to adapter store" in line and "shared_memory=[True]" in line for line in lines)


def test_two_engines_are_registered_under_names_of_their_own() -> None:
    command = [sys.executable, "-m", "loraplex_client", "status", "--target", TARGET]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    assert len(set(re.findall(r"(\w+):8520", done.stdout))) == 2


@pytest.mark.parametrize("service", ["gateway", "adapter_store", "engine"])
def test_a_service_has_no_rights_and_cannot_write_its_root(service: str) -> None:
    program = "import os; print(os.getuid(), open('/proc/self/status').read().split('CapEff:')[1].split()[0])"
    writes = "open('/opt/loraplex/x', 'w')"

    told = compose("exec", "-T", service, "python", "-c", program).split()
    done = subprocess.run(
        [*COMPOSE, "exec", "-T", service, "python", "-c", writes], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert told == ["10001", "0000000000000000"]
    assert "Read-only file system" in done.stderr
