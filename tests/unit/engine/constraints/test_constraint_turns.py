"""Which constraint is compiled next: one tenant's compiles hold up its own requests only."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from loraplex_common.structured_output import ConstraintKind, StructuredOutput
from loraplex_engine.constraints.compiler import CachingCompiler, make_constraints
from support.constraint_rig import EOS, LIMITS, PADDED_VOCAB_SIZE, takes
from support.tokenizers_for_tests import byte_level_tokenizer
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


def _const(value: str) -> StructuredOutput:
    return StructuredOutput(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps({"const": value}))


class Gates:
    """Trials that wait until they are let go, in the order in which they began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.open = asyncio.Event()
        self.open_for: set[str] = set()
        original = CachingCompiler._try_out

        async def wait(compiler: CachingCompiler, wanted: StructuredOutput) -> tuple[str, int]:
            name = json.loads(wanted.text)["const"]
            self.begun.append(name)
            if name not in self.open_for:
                await self.open.wait()
            return await original(compiler, wanted)

        monkeypatch.setattr(CachingCompiler, "_try_out", wait)


@pytest.fixture
async def compiler(tmp_path: Path) -> AsyncIterator[CachingCompiler]:
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer().to_str())
    limits = replace(LIMITS, num_compiles=2)
    constraints = make_constraints(tmp_path, vocab_size=PADDED_VOCAB_SIZE, eos_token_ids=(EOS,), limits=limits)
    yield constraints.compiler
    await constraints.close()


async def test_a_tenant_whose_compiles_take_long_holds_up_no_other(
    compiler: CachingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = Gates(monkeypatch)
    gates.open_for = {"mine"}
    slow = [asyncio.create_task(compiler.compile(_const(f"slow{num}"), "greedy")) for num in range(20)]
    await eventually(lambda: gates.begun)
    assert takes(await asyncio.wait_for(compiler.compile(_const("mine"), "other"), 30), '"mine"')
    assert gates.begun == ["slow0", "mine"]
    gates.open.set()
    await asyncio.gather(*slow)
    assert gates.begun[2:] == [f"slow{num}" for num in range(1, 20)]


async def test_a_compile_that_several_tenants_wait_for_takes_the_first_turn_of_any(
    compiler: CachingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = Gates(monkeypatch)
    gates.open_for = {"slow5"}
    slow = [asyncio.create_task(compiler.compile(_const(f"slow{num}"), "greedy")) for num in range(10)]
    await eventually(lambda: gates.begun)
    assert takes(await asyncio.wait_for(compiler.compile(_const("slow5"), "other"), 30), '"slow5"')
    assert gates.begun == ["slow0", "slow5"]
    gates.open.set()
    await asyncio.gather(*slow)
    assert len(gates.begun) == 10


async def test_a_compile_that_no_request_waits_for_any_more_does_not_begin(
    compiler: CachingCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = Gates(monkeypatch)
    first = asyncio.create_task(compiler.compile(_const("first"), "greedy"))
    await eventually(lambda: gates.begun)
    gone = [asyncio.create_task(compiler.compile(_const(f"gone{num}"), "greedy")) for num in range(50)]
    await asyncio.sleep(0)
    for task in gone:
        task.cancel()
    await asyncio.gather(*gone, return_exceptions=True)
    again = asyncio.create_task(compiler.compile(_const("gone7"), "greedy"))
    gates.open.set()
    assert takes(await again, '"gone7"')
    assert takes(await first, '"first"')
    assert gates.begun == ["first", "gone7"]
    assert not compiler._running
