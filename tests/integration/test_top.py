"""``loraplex top`` against a real stack: on a terminal, once, and for programs."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from loraplex_client import Client
from support.stack_fixtures import import_all

if TYPE_CHECKING:
    from support.stack import Stack

pytestmark = pytest.mark.integration
TIMEOUT_S = 60.0


def top(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loraplex_client", "top", "--target", stack.gateway.grpc, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def use_adapter(stack: Stack) -> None:
    import_all(stack)
    with Client(stack.gateway.grpc, store_target=stack.store.grpc) as client:
        client.generate_once(prompt_token_ids=[5, 6, 7], adapter="tiny-b", max_new_tokens=4)


def test_json_names_the_pages_of_each_owner_and_the_adapters_on_the_device(tiny_stack: Stack) -> None:
    use_adapter(tiny_stack)

    result = top(tiny_stack, "--once", "--json")
    read = json.loads(result.stdout)

    assert result.returncode == 0, result.stderr
    (engine,) = read["engines"]
    assert engine["error"] == ""
    assert engine["pages"]["adapter"] == sum(each["pages"] for each in read["adapters"]) > 0
    (used,) = [each for each in read["adapters"] if each["name"] == "tiny-b"]
    assert used["requests_per_s"] > 0


def test_once_prints_tables_and_a_pipe_without_it_is_refused(tiny_stack: Stack) -> None:
    use_adapter(tiny_stack)

    once, piped = top(tiny_stack, "--once"), top(tiny_stack)

    assert once.returncode == 0, once.stderr
    assert "1 engines" in once.stdout
    assert "tiny-b" in once.stdout
    assert piped.returncode == 2
    assert "--once" in piped.stderr


def test_on_a_terminal_it_shows_the_fleet_until_it_is_interrupted(tiny_stack: Stack) -> None:
    use_adapter(tiny_stack)
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "loraplex_client", "top", "--target", tiny_stack.gateway.grpc]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown, deadline = b"", time.monotonic() + TIMEOUT_S
    try:
        while b"tiny-b" not in shown:
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            if select.select([leader], [], [], 1.0)[0]:
                shown += os.read(leader, 65536)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(leader, 65536):
                shown += chunk
        assert process.wait(TIMEOUT_S) == 130
    finally:
        process.kill()
        process.wait()
        os.close(leader)

    assert b"\x1b[?1049l" in shown, "the screen of before is not given back"
    assert b"KV/LORA/CACHED/FREE" in shown
    assert b"Traceback" not in shown
