"""How streams end when their engine hangs, dies with its last token, or comes back under another name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.alias_feed import AdapterEntry
from loraplex_common.errors import AdapterNotFoundError, DeadlineError, LoraplexError, ModelNotFoundError
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_gateway.requests import attempts, relay
from support.engine_double import EngineDouble
from support.gateway_rig import DIGEST, Rig, letters, running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable

pytestmark = pytest.mark.integration

Once = gateway_pb2.GenerateOnceRequest


async def error_of(call: Awaitable[Any]) -> LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


def text_of(rig: Rig, token_ids: list[int]) -> str:
    return rig.app.catalog.models[0].tokenizer.decode_now(token_ids, skip_special_tokens=True)


async def test_an_engine_that_hangs_cannot_hold_a_request_beyond_the_longest_deadline(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "ENGINE_DEADLINE_SLACK_S", 0.1)
    async with running_gateway(valkey_url, max_stream_s=0.5) as rig:
        rig.engine.hold_at = 2  # and it never looks at time_left

        error = await error_of(rig.stub.GenerateOnce(Once(request=text_request(request_id="hung"))))

        assert isinstance(error, DeadlineError)
        await rig.engine.wait_for(lambda: rig.engine.aborted_ids == ["hung"])
        rig.check_idle()


async def test_a_complete_output_is_no_failure_however_many_engines_were_lost(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "MAX_FRUITLESS_LOSSES", 0)
    async with running_gateway(valkey_url, reply=lambda submit: [*letters(submit), 99]) as rig:
        rig.engine.hold_at = 8  # all of max_new_tokens is out, the end is not
        rig.engine.reply = letters
        monkeypatch.setattr(EngineDouble, "_step", _without_end(EngineDouble._step))
        call: Any = rig.stub.Generate(text_request())
        seen = [await call.read(), await call.read()]
        while sum(len(response.chunk.token_ids) for response in seen) < 8:
            seen.append(await call.read())

        await rig.engine.kill()

        last = await call.read()
        assert last.finished.finish_reason == gateway_pb2.FINISH_REASON_LENGTH
        assert last.finished.usage.output_tokens == 8


def _without_end(step: Any) -> Any:
    """Make a double keep the ends of requests to itself."""

    def silent(self: EngineDouble, *arguments: Any) -> Any:
        message = step(self, *arguments)
        if message is not None:
            kept = [output for output in message.outputs if not output.HasField("finish")]
            del message.outputs[:]
            message.outputs.extend(kept)
        return message

    return silent


async def test_the_prompts_probabilities_are_not_computed_again_elsewhere(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2) as rig:
        for engine in rig.engines:
            engine.hold_at = 3
        options = gateway_pb2.ResponseOptions(prompt_logprobs=1)
        call: Any = rig.stub.Generate(text_request(response_options=options))
        await call.read()
        first = next(engine for engine in rig.engines if engine.submits)
        (second,) = (engine for engine in rig.engines if engine is not first)
        assert first.submits[0].prompt_logprobs == 1
        second.hold_at = None

        await first.kill()

        async for response in _rest(call):
            last = response
        assert last.HasField("finished")
        assert not second.submits[0].HasField("prompt_logprobs")


async def _rest(call: Any) -> Any:
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


async def test_a_cancelled_request_gives_out_the_text_that_was_held_back(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 3
        text = text_of(rig, list(letters(await _submit_of(rig)))[:3])
        call: Any = rig.stub.Generate(
            text_request(
                request_id="held",
                stopping=gateway_pb2.StoppingParams(max_new_tokens=8, stop_strings=[text[-1] + "never"]),
            )
        )
        seen = ""
        while len(seen) < len(text) - 1:
            seen += (await call.read()).chunk.text

        await rig.stub.CancelRequest(gateway_pb2.CancelRequestRequest(request_id="held"))

        async for response in _rest(call):
            seen += response.chunk.text
            last = response
        assert seen == text
        assert last.finished.finish_reason == gateway_pb2.FINISH_REASON_CANCELLED
        assert last.finished.usage.output_tokens == 3


async def _submit_of(rig: Rig) -> Any:
    """Return what the engine gets to see of `text_request`."""
    call = rig.stub.Generate(text_request())
    await call.read()
    call.cancel()
    await rig.engine.wait_for(lambda: bool(rig.engine.aborted_ids))
    return rig.engine.submits[0]


async def test_an_engine_that_restarts_on_its_port_is_the_same_to_clients(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        old = rig.engine
        reborn = EngineDouble(base=old.base, reply=letters)
        await old.kill()
        await reborn.start(old.port)
        await reborn.register(rig.valkey)  # while the old one's lease still runs
        try:
            # The old one's record leads to it as well, but is another engine's.
            await eventually(lambda: [s.engine_id for s in rig.app.pool.links if s.is_candidate] == [reborn.engine_id])
            for _ in range(4):
                answer = await rig.stub.GenerateOnce(Once(request=text_request()))
                assert answer.finished.usage.output_tokens == 8

            await old.unregister(rig.valkey)
            await eventually(lambda: [s.engine_id for s in rig.app.pool.links] == [reborn.engine_id])
            rig.check_idle()
        finally:
            await reborn.unregister(rig.valkey)
            await reborn.kill()


async def test_models_that_cannot_be_shown_are_not_found(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        fingerprint = rig.engine.base.fingerprint
        rig.app.names.update([AdapterEntry(name="bare", base_fingerprints={DIGEST: fingerprint})])

        async def get(name: str) -> gateway_pb2.GetModelResponse:
            return await rig.stub.GetModel(gateway_pb2.GetModelRequest(name=name))

        assert isinstance(await error_of(get("stranger")), ModelNotFoundError)
        assert isinstance(await error_of(get("bare")), AdapterNotFoundError)
        assert (await get(f"bare@{DIGEST}")).model.revision == DIGEST


async def test_a_caller_that_hangs_up_at_its_deadline_is_counted_as_late(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 2

        call = rig.stub.GenerateOnce(Once(request=text_request()), timeout=0.4)
        assert isinstance(await error_of(call), DeadlineError)
        await eventually(lambda: _codes(rig) == ["DEADLINE_EXCEEDED"])


async def test_a_bug_of_ours_is_counted_as_one(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_gateway(valkey_url) as rig:

        async def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(rig.app.core._preparer, "prepare", broken)

        error = await error_of(rig.stub.GenerateOnce(Once(request=text_request())))

        assert error.code is grpc.StatusCode.INTERNAL
        assert _codes(rig) == ["INTERNAL"]


def _codes(rig: Rig) -> list[str]:
    """Return the codes that requests ended with."""
    samples = next(iter(rig.app.metrics.requests.collect())).samples
    return [sample.labels["code"] for sample in samples if sample.name.endswith("_total")]
