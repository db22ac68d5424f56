"""A stack that runs longer than its certificates are good: no caller notices."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from loraplex_client import AsyncClient
from loraplex_client.credentials.certificates import read_certificate
from loraplex_client.serve import ServeConfig, Stack, assign_ports
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.serve_process import SMALL

if TYPE_CHECKING:
    from pathlib import Path

LIFETIME_S = 20.0
DEADLINE_S = 120.0

pytestmark = [pytest.mark.integration, pytest.mark.slow]


async def test_a_stack_outlives_its_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    base = write_base_model(tmp_path / "base" / "tiny", TinyBase())
    config = ServeConfig(
        model=base,
        data_dir=tmp_path / "data",
        certificate_lifetime_s=LIFETIME_S,
        engine_args=SMALL[:-2],
        drain_grace_s=1.0,
        **assign_ports(0, {}),
    )
    reports: list[str] = []
    stack = Stack(config, reports.append)
    await stack.start()
    running = asyncio.create_task(stack.run())
    (certificate,) = (tmp_path / "data" / "credentials").glob("run-*/engine/tls.crt")
    first = read_certificate(certificate).ends.timestamp()
    num_answers = 0

    # Twice its lifetime: a part that still has the first certificate, or the first authority alone, is refused by then.
    deadline = time.monotonic() + DEADLINE_S
    while time.time() < first + LIFETIME_S:
        assert time.monotonic() < deadline
        async with AsyncClient(stack.grpc) as client:
            name = f"a{num_answers}"
            await client.adapters.upload(name, write_adapter(tmp_path / name, base, Recipe(rank=2, seed=num_answers)))
            await client.generate_once(prompt_token_ids=[5], adapter=name, max_new_tokens=2, timeout=20)
            num_answers += 1
        await asyncio.sleep(0.5)

    assert read_certificate(certificate).ends.timestamp() > first
    assert num_answers > 5
    assert [line for line in reports if not line.startswith("starting ")] == []
    running.cancel()
    await stack.stop()
