"""Streams that clients resume, through the same gateway or another."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import gateway_pb2
from loraplex_common.auth import ANYBODY
from loraplex_common.errors import (
    AdapterNotFoundError,
    DrainingError,
    RequestRunningError,
    StreamInterruptedError,
)
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_gateway.requests.claims import RequestClaims
from support.cut_streams import (
    CUT,
    NUM_TOKENS,
    Cut,
    another_gateway,
    cut,
    long_text,
    read_all,
    read_up_to,
    refusal,
    rest_of,
)
from support.gateway_rig import DIGEST, OTHER_DIGEST, letters, running_gateway
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


async def test_a_stream_goes_on_through_another_gateway_exactly_where_it_was(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as one, another_gateway(valkey_url) as two:
        request = long_text(adapter="poet", response_options=gateway_pb2.ResponseOptions(logprobs=1))
        got = await cut(one, request)
        original = one.engine.submits[-1]

        responses = await read_all(two, got.resumed())

        (resumed,) = one.engine.submits[1:]
        assert list(resumed.resumed_token_ids) == list(letters(original))[:CUT]
        assert resumed.prompt_token_ids == original.prompt_token_ids
        assert (resumed.adapter_digest, resumed.sampling.seed) == (DIGEST, original.sampling.seed)
        whole = Cut(request, [*got.responses, *responses])
        chunks = [response.chunk for response in whole.responses if response.HasField("chunk")]
        assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
        assert whole.token_ids == list(letters(original))
        assert [entry.chosen.token_id for chunk in chunks for entry in chunk.logprobs] == whole.token_ids
        assert responses[0].started.seed == original.sampling.seed
        assert responses[0].started.resume_token
        finished = responses[-1].finished
        assert finished.finish_reason == gateway_pb2.FINISH_REASON_LENGTH
        assert (finished.usage.output_tokens, finished.usage.prompt_tokens) == (NUM_TOKENS, got.started.prompt_tokens)
        await eventually(lambda: one.app.claims.num_running == two.app.claims.num_running == 0)
        one.check_idle()
        two.check_idle()


async def test_a_moved_label_changes_nothing_and_a_lost_right_or_revision_is_refused(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        got = await cut(rig, long_text(adapter="poet:prod"))
        base = rig.engine.base.fingerprint

        rig.store.put("poet", {"latest": OTHER_DIGEST, "prod": DIGEST}, fingerprint=base)
        names = rig.app.names
        await eventually(lambda: (entry := names.entry("poet", ANYBODY)) and entry.labels["prod"] == DIGEST)
        responses = await read_all(rig, got.resumed())
        assert responses[0].started.adapter_revision == rig.engine.submits[-1].adapter_digest == OTHER_DIGEST

        rig.store.put("poet", {"prod": DIGEST}, fingerprint=base)
        await eventually(
            lambda: (entry := names.entry("poet", ANYBODY)) and OTHER_DIGEST not in entry.base_fingerprints
        )
        assert isinstance(await refusal(rig, got.resumed()), AdapterNotFoundError)

        rig.store.put("poet", {"prod": OTHER_DIGEST}, fingerprint=base, allowed=["vip"])
        await eventually(lambda: names.entry("poet", ANYBODY) is None)
        assert isinstance(await refusal(rig, got.resumed()), AdapterNotFoundError)


async def test_gateways_with_a_key_file_need_no_valkey_to_agree(valkey_url: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name[0] * 40)
    async with (
        running_gateway(valkey_url, resume_key_file=tmp_path / "one") as one,
        another_gateway(valkey_url, resume_key_file=tmp_path / "one") as same,
        another_gateway(valkey_url, resume_key_file=tmp_path / "two") as different,
    ):
        got = await cut(one, long_text())

        assert (await refusal(different, got.resumed())).metadata == {"cause": "forged"}
        assert (await read_all(same, got.resumed()))[-1].HasField("finished")


async def test_who_resumes_on_the_same_gateway_ends_the_old_stream(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2) as rig:
        for engine in rig.engines:
            engine.hold_at = CUT
        old: Any = rig.stub.Generate(long_text())
        got = await read_up_to(old, long_text(), CUT)
        holder = next(engine for engine in rig.engines if engine.submits)

        new: Any = rig.stub.Generate(got.resumed(), timeout=20)
        assert (await new.read()).HasField("started")

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await old.read()
        error = error_from_rpc(caught.value)
        assert isinstance(error, RequestRunningError)
        assert "another call has resumed" in error.message
        assert not error.metadata.get("resume_token")
        await holder.wait_for(lambda: holder.aborted_ids == ["r1"])
        for engine in rig.engines:
            engine.release()
        responses = await rest_of(new)
        assert responses[-1].finished.usage.output_tokens == NUM_TOKENS
        await eventually(lambda: rig.app.claims.num_running == 0)
        rig.check_idle()


async def test_who_resumes_elsewhere_ends_the_old_stream_at_its_renewal(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as one, another_gateway(valkey_url) as two:
        one.engine.hold_at = CUT
        old: Any = one.stub.Generate(long_text())
        got = await read_up_to(old, long_text(), CUT)
        new: Any = two.stub.Generate(got.resumed(), timeout=20)
        assert (await new.read()).HasField("started")
        assert await two.app.claims.owner("default", "r1") == two.app.gateway_id

        await one.app.claims._renew()

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await old.read()
        assert isinstance(error_from_rpc(caught.value), RequestRunningError)
        assert await two.app.claims.owner("default", "r1") == two.app.gateway_id
        one.engine.release()
        assert (await rest_of(new))[-1].HasField("finished")


async def test_the_claim_of_a_gateway_that_is_gone_stands_in_nobodys_way(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        got = await cut(rig, long_text())
        dead = RequestClaims(rig.valkey, "dead")
        held = dead.hold("default", "r1")
        await held.__aenter__()  # it has just said that it lives, and never will again

        assert isinstance(await refusal(rig, long_text()), RequestRunningError)
        assert (await read_all(rig, got.resumed()))[-1].HasField("finished")
        await held.__aexit__(None, None, None)
        await dead.close()


async def test_errors_of_a_stream_that_can_be_resumed_carry_its_token(valkey_url: str) -> None:
    async with running_gateway(valkey_url, failover_wait_s=0.0) as rig:
        rig.engine.hold_at = CUT
        call = rig.stub.Generate(long_text())
        got = await read_up_to(call, long_text(), CUT)

        running = await refusal(rig, long_text())
        assert isinstance(running, RequestRunningError)
        assert running.metadata["resume_token"] == got.started.resume_token

        await rig.engine.unregister(rig.valkey)
        await rig.engine.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        interrupted = error_from_rpc(caught.value)
        assert isinstance(interrupted, StreamInterruptedError)
        assert interrupted.metadata["resume_token"] == got.started.resume_token


async def test_a_resumed_stream_keeps_its_time_limit_and_its_token_can_be_used_again(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        request = long_text(time_limit=Duration(seconds=100))
        got = await cut(rig, request, at=3)
        again = await cut(rig, got.resumed(), at=5)
        assert again.token_ids == list(letters(rig.engine.submits[0]))[3:5]
        both = Cut(request, [again.responses[0], *got.responses[1:], *again.responses[1:]])

        responses = await read_all(rig, both.resumed())

        assert Cut(request, [*both.responses, *responses]).token_ids == list(letters(rig.engine.submits[0]))
        limits = [submit.time_limit.ToNanoseconds() / 1e9 for submit in rig.engine.submits]
        assert limits[0] == pytest.approx(100, abs=0.1)
        assert limits[0] > limits[1] > limits[2] > 80


async def test_prompt_logprobs_and_a_refusal_to_wait_are_the_first_streams_matter(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        options = gateway_pb2.ResponseOptions(prompt_logprobs=1)
        got = await cut(rig, long_text(response_options=options, load_policy=gateway_pb2.LOAD_POLICY_FAIL_FAST))

        await read_all(rig, got.resumed())

        first, second = rig.engine.submits
        assert (first.HasField("prompt_logprobs"), second.HasField("prompt_logprobs")) == (True, False)
        assert first.load_policy == gateway_pb2.LOAD_POLICY_FAIL_FAST
        assert second.load_policy == gateway_pb2.LOAD_POLICY_WAIT


async def test_tokens_are_counted_once(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        got = await cut(rig, long_text())
        await read_all(rig, got.resumed())

        def sample(name: str, **labels: str) -> float:
            return rig.app._metrics_registry.get_sample_value(name, labels) or 0.0

        tokens = "loraplex_gateway_tokens_total"
        await eventually(lambda: sample(tokens, tenant="default", kind="output") == NUM_TOKENS)
        assert sample(tokens, tenant="default", kind="input") == got.started.prompt_tokens
        assert sample("loraplex_gateway_client_resumes_total", outcome="continued") == 1


async def test_a_gateway_that_drains_hands_its_streams_over(valkey_url: str) -> None:
    async with running_gateway(valkey_url, drain_grace_s=1.0) as one, another_gateway(valkey_url) as two:
        one.engine.hold_at = CUT
        call: Any = one.stub.Generate(long_text())
        got = await read_up_to(call, long_text(), CUT)

        draining = asyncio.create_task(one.app.drain())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        error = error_from_rpc(caught.value)
        await draining

        assert isinstance(error, DrainingError)
        assert error.metadata["resume_token"] == got.started.resume_token
        one.engine.release()
        assert (await rest_of(two.stub.Generate(got.resumed(), timeout=20)))[-1].HasField("finished")
