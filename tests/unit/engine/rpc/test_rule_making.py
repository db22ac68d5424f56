"""Requests whose structure is being compiled: what ends them, and that nothing waits for them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import DeadlineError, InvalidParameterError, QueueTimeoutError
from loraplex_engine.rpc.rule_making import RuleMaker
from support.constraints import Stride, StrideFiller
from support.engine_harness import fake_engine
from support.fake_runner import VOCAB_SIZE
from support.request_campaign import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_common.structured_output import StructuredOutput
    from support.engine_harness import EngineHarness
    from support.engine_sessions import EngineSessionClient

EOS = (7,)
REGEX = gateway_pb2.StructuredOutput(regex="a")
SOON = Duration(nanos=50_000_000)


class GatedCompiler:
    """A compiler that waits until `gate` is set, then returns a `Stride` or raises `error`."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        self.is_cancelled = False
        self.error: Exception | None = None

    async def compile(self, wanted: StructuredOutput, fairness_key: str = "") -> Stride:
        assert wanted.text == "a"
        self.begun.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        if self.error is not None:
            raise self.error
        return Stride(least=99, most=5)


@asynccontextmanager
async def session() -> AsyncIterator[tuple[EngineHarness, EngineSessionClient, GatedCompiler]]:
    compiler = GatedCompiler()
    with fake_engine(filler=StrideFiller(VOCAB_SIZE)) as (harness, _):
        async with serving(harness, RuleMaker(compiler, EOS)) as client:
            yield harness, client, compiler
        harness.check_idle()


async def test_requests_that_come_later_overtake_one_that_is_being_compiled() -> None:
    async with session() as (harness, client, compiler):
        waiting = await client.submit(1, [1, 2], 20, structured_output=REGEX)
        await compiler.begun.wait()

        assert len(await client.finish(await client.submit(2, [1, 2], 6))) == 6

        assert harness.engine.snapshot().waiting == 0
        assert waiting.started is None
        compiler.gate.set()
        tokens = await client.finish(waiting)
        assert [token % 5 for token in tokens] == [0, 1, 2, 3, 4]
        assert waiting.finish is not None
        assert waiting.finish.finish_reason == gateway_pb2.FINISH_REASON_STOP
        assert not waiting.finish.HasField("stop_token_id")


async def test_a_structure_that_cannot_be_compiled_ends_its_own_request_with_the_reason() -> None:
    async with session() as (_, client, compiler):
        compiler.error = InvalidParameterError("regex: unclosed group", field="structured_output.regex")
        compiler.gate.set()

        error = await client.fail(await client.submit(1, [1, 2], structured_output=REGEX))

        assert isinstance(error, InvalidParameterError)
        assert (error.message, error.field) == ("regex: unclosed group", "structured_output.regex")
        assert len(await client.finish(await client.submit(1, [1, 2], 6))) == 6


async def test_a_fault_of_the_compiler_ends_its_own_request_with_an_error_id() -> None:
    async with session() as (_, client, compiler):
        compiler.error = ZeroDivisionError("a bug")
        compiler.gate.set()

        error = await client.fail(await client.submit(1, [1, 2], structured_output=REGEX))

        assert error.reason == "INTERNAL"
        assert error.metadata["error_id"]


async def test_resumed_tokens_that_the_structure_does_not_allow_are_refused() -> None:
    async with session() as (_, client, compiler):
        compiler.gate.set()

        refused = await client.fail(await client.submit(1, [1], 20, structured_output=REGEX, resumed_token_ids=[0, 2]))
        complete = await client.submit(2, [1], 20, structured_output=REGEX, resumed_token_ids=[0, 1, 2, 3, 4])

        assert isinstance(refused, InvalidParameterError)
        assert await client.finish(complete) == []


async def test_an_abort_ends_a_request_that_is_being_compiled_and_its_slot_can_be_used_again() -> None:
    async with session() as (_, client, compiler):
        gone = await client.submit(1, [1, 2], structured_output=REGEX)
        await compiler.begun.wait()
        await client.abort(1)

        assert await client.finish(gone) == []
        assert gone.finish is not None
        assert gone.finish.finish_reason == gateway_pb2.FINISH_REASON_CANCELLED
        assert compiler.is_cancelled
        compiler.gate.set()
        again = await client.submit(1, [1, 2], 20, structured_output=REGEX)
        assert len(await client.finish(again)) == 5


async def test_limits_of_time_pass_while_a_structure_is_compiled() -> None:
    async with session() as (_, client, _compiler):
        late = await client.submit(1, [1, 2], structured_output=REGEX, time_left=SOON)
        queued = await client.submit(2, [1, 2], structured_output=REGEX, queue_timeout=SOON)
        cut = await client.submit(3, [1, 2], structured_output=REGEX, time_limit=SOON)

        assert isinstance(await client.fail(late), DeadlineError)
        assert isinstance(await client.fail(queued), QueueTimeoutError)
        assert await client.finish(cut) == []
        assert cut.finish is not None
        assert cut.finish.finish_reason == gateway_pb2.FINISH_REASON_TIME_LIMIT


async def test_a_session_that_ends_leaves_no_compile_behind() -> None:
    async with session() as (_, client, compiler):
        await client.submit(1, [1, 2], structured_output=REGEX)
        await compiler.begun.wait()
        client.outcomes.clear()

    assert compiler.is_cancelled


async def test_banned_sequences_need_no_compiler() -> None:
    async with session() as (_, client, compiler):
        free = await client.finish(await client.submit(1, [1, 2], 12))
        bans = [gateway_pb2.TokenIds(ids=free[1:3]), gateway_pb2.TokenIds(ids=free[7:8])]

        kept = await client.finish(await client.submit(2, [1, 2], 12, bad_token_sequences=bans))

        assert not compiler.begun.is_set()
        assert kept[:2] == free[:2]
        assert kept[2] != free[2]
        assert free[7] not in kept


async def test_a_request_is_compiled_and_served_after_the_gateway_has_closed_its_half() -> None:
    async with session() as (_, client, compiler):
        outcome = await client.submit(1, [1, 2], 20, structured_output=REGEX)
        await client.close_input()
        compiler.gate.set()

        assert len(await client.finish(outcome)) == 5
        await client.is_over.wait()
        client.is_over.clear()
