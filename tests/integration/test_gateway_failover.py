"""Streams whose engine is silent, or is lost again and again, or is the only one: they move or wait, and none is lost."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import QueueTimeoutError, RequestLostError, StreamInterruptedError
from loraplex_common.rpc_errors import error_from_rpc
from support.engine_double import EngineDouble
from support.gateway_rig import Rig, letters, running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from loraplex_common.errors import LoraplexError

pytestmark = pytest.mark.integration

Once = gateway_pb2.GenerateOnceRequest
NUM_TOKENS = 20
SILENCE_S = 0.6


def long_text(**fields: Any) -> gateway_pb2.GenerateRequest:
    return text_request(stopping=gateway_pb2.StoppingParams(max_new_tokens=NUM_TOKENS), **fields)


def tokens_of(responses: list[Any]) -> list[int]:
    return [token for response in responses for token in response.chunk.token_ids]


async def read(call: Any, num_tokens: int = 10 * NUM_TOKENS) -> list[Any]:
    """Read a stream until it has given so many more tokens, or to its end."""
    responses: list[Any] = []
    while len(tokens_of(responses)) < num_tokens and (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def has_submits(engines: list[EngineDouble], number: int) -> bool:
    return sum(len(engine.submits) for engine in engines) >= number


async def failure_of(call: Any) -> LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call)
    return error_from_rpc(caught.value)


def holder_of(rig: Rig) -> EngineDouble:
    return next(engine for engine in rig.engines if engine.submits)


async def test_streams_of_an_engine_that_is_silent_move_and_what_it_says_later_is_ignored(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2, engine_silence_s=SILENCE_S) as rig:
        for engine in rig.engines:
            engine.hold_at = 5
        call = rig.stub.Generate(long_text(), timeout=30)
        responses = await read(call, 5)
        silent = holder_of(rig)
        (other,) = [engine for engine in rig.engines if engine is not silent]
        other.hold_at = 9

        silent.is_silent = True
        began = time.monotonic()
        responses += await read(call, 4)
        assert time.monotonic() - began < SILENCE_S + 5.0
        answer = await rig.stub.GenerateOnce(Once(request=text_request()), timeout=10)
        assert answer.started.engine_id == other.engine_id

        silent.is_silent = False
        silent.release()  # it goes on with a request that is another's by now
        await eventually(lambda: all(link.is_candidate for link in rig.app.pool.links))
        other.release()
        responses += await read(call)

        assert tokens_of(responses) == list(letters(silent.submits[0]))
        assert responses[-1].HasField("finished")
        other.extra_load = 100
        assert silent.num_sessions == 2, "it is used again, on a session of its own"
        rig.check_idle()


async def test_a_request_that_two_engines_fell_silent_with_is_not_sent_to_a_third(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=3, engine_silence_s=SILENCE_S) as rig:
        for engine in rig.engines:
            engine.hold_at = 0
        call = rig.stub.Generate(text_request(), timeout=30)
        for number in (1, 2):
            await eventually(partial(has_submits, rig.engines, number))
            next(engine for engine in rig.engines if engine.submits and not engine.is_silent).is_silent = True

        assert isinstance(await failure_of(call), RequestLostError)
        assert sum(len(engine.submits) for engine in rig.engines) == 2
        for engine in rig.engines:
            engine.is_silent = False
            engine.notify()


async def test_an_engine_that_is_quiet_gets_nothing_new_while_there_are_others(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2, engine_silence_s=3.0) as rig:
        quiet, other = rig.engines
        quiet.is_silent, other.extra_load = True, 50  # by its load the quiet one would be chosen
        other.notify()
        await asyncio.sleep(2.3)  # more than half of what it may be silent for

        for _ in range(3):
            await rig.stub.GenerateOnce(Once(request=text_request()), timeout=10)

        assert (len(quiet.submits), len(other.submits)) == (0, 3)
        quiet.is_silent = False
        quiet.notify()


async def test_a_held_engine_that_reports_its_load_is_not_silent(valkey_url: str) -> None:
    async with running_gateway(valkey_url, engine_silence_s=1.5) as rig:
        rig.engine.hold_at = 2
        call = rig.stub.Generate(long_text(), timeout=30)
        responses = await read(call, 2)
        await asyncio.sleep(3.0)  # the claim is about time passing

        rig.engine.release()

        assert len(tokens_of(responses + await read(call))) == NUM_TOKENS
        assert rig.engine.num_sessions == 1


async def test_a_stream_that_gets_on_has_no_last_engine(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=7) as rig:
        for engine in rig.engines:
            engine.hold_at = 2
        call = rig.stub.Generate(long_text(), timeout=30)
        responses, alive = await read(call, 2), list(rig.engines)

        while len(alive) > 1:
            holder = next(engine for engine in alive if engine.submits)
            alive = [engine for engine in alive if engine is not holder]
            for engine in alive:
                engine.hold_at = len(tokens_of(responses)) + 2
            await holder.kill()
            responses += await read(call, 2)
        alive[0].release()
        responses += await read(call)

        assert tokens_of(responses) == list(letters(alive[0].submits[0]))
        assert responses[-1].HasField("finished")


async def test_losses_without_progress_count_only_in_a_row(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=5) as rig:
        for engine in rig.engines:
            engine.hold_at = 2
        call = rig.stub.Generate(long_text(), timeout=30)
        responses, alive = await read(call, 2), list(rig.engines)

        for num_more in (0, 2, 0, 2):  # lost without and with a token since, twice
            holder = next(engine for engine in alive if engine.submits)
            alive = [engine for engine in alive if engine is not holder]
            for engine in alive:
                engine.hold_at = len(tokens_of(responses)) + num_more
            await holder.kill()
            await eventually(partial(has_submits, alive, 1))
            responses += await read(call, num_more) if num_more else []
        alive[0].release()
        responses += await read(call)

        assert tokens_of(responses) == list(letters(alive[0].submits[0]))


async def test_a_stream_waits_for_the_only_engine_to_come_back(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 3
        call = rig.stub.Generate(long_text(), timeout=60)
        responses = await read(call, 3)
        await rig.engine.kill()
        await rig.engine.unregister(rig.valkey)
        await asyncio.sleep(6.0)  # as long as an engine takes to start

        new = EngineDouble(base=rig.engine.base, reply=letters)
        rig.engines.append(new)
        await new.start()
        await new.register(rig.valkey)
        responses += await read(call)

        assert tokens_of(responses) == list(letters(new.submits[0]))
        assert responses[-1].HasField("finished")
        rig.check_idle()


async def test_whoever_waits_for_an_engine_can_be_cancelled_and_keeps_its_limits(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 3
        limited = long_text()
        limited.time_limit.FromMilliseconds(1500)
        queued = long_text()
        queued.queue_timeout.FromMilliseconds(1500)
        calls = [rig.stub.Generate(request, timeout=30) for request in (long_text(request_id="mine"), limited)]
        for call in calls:
            assert len(tokens_of(await read(call, 3))) == 3
        rig.engine.is_silent = True
        unstarted = rig.stub.Generate(queued, timeout=30)
        unstarted_failure = asyncio.create_task(failure_of(unstarted))
        await rig.engine.wait_for(lambda: len(rig.engine.submits) == 3)
        await rig.engine.kill()

        answer = await rig.stub.CancelRequest(gateway_pb2.CancelRequestRequest(request_id="mine"))

        assert answer.was_running
        assert (await read(calls[0]))[-1].finished.finish_reason == gateway_pb2.FINISH_REASON_CANCELLED
        assert (await read(calls[1]))[-1].finished.finish_reason == gateway_pb2.FINISH_REASON_TIME_LIMIT
        assert isinstance(await unstarted_failure, QueueTimeoutError)
        rig.check_idle()


async def test_nobody_waits_longer_than_an_engine_is_expected(valkey_url: str) -> None:
    async with running_gateway(valkey_url, failover_wait_s=0.5) as rig:
        rig.engine.hold_at = 3
        call = rig.stub.Generate(long_text(), timeout=30)
        await read(call, 3)
        await rig.engine.kill()

        assert isinstance(await failure_of(call), StreamInterruptedError)
